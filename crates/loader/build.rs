//! Embeds the compiled packet programs.

use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rerun-if-env-changed=CIRRI_BPF_OBJECT");
    let object = std::env::var_os("CIRRI_BPF_OBJECT").map(PathBuf::from).unwrap_or_else(|| {
        let here = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
        Path::new(&here).join("../../target/bpf/cirri.bpf.o")
    });
    println!("cargo::rerun-if-changed={}", object.display());
    match object.canonicalize() {
        Ok(object) => println!("cargo::rustc-env=CIRRI_BPF_OBJECT={}", object.display()),
        Err(error) => println!(
            "cargo::error=the packet programs are not built ({}: {error}); run `cargo xtask build` first, \
             or name an object with CIRRI_BPF_OBJECT",
            object.display()
        ),
    }
}
