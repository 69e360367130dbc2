//! See `gantry_tests::fuzz::selectors`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| gantry_tests::fuzz::selectors(data));
