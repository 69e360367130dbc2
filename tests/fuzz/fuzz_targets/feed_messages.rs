//! See `gantry_tests::fuzz::feed_messages`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| gantry_tests::fuzz::feed_messages(data));
