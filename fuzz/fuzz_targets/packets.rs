#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| cirri_fuzz::packets(input));
