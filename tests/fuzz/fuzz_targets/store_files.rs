//! See `gantry_tests::fuzz::store_files`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| gantry_tests::fuzz::store_files(data));
