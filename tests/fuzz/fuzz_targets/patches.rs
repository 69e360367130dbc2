//! See `gantry_tests::fuzz::patches`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| gantry_tests::fuzz::patches(data));
