//! `cargo xtask`: everything a developer types at this repository.
//!
//! Each command sets up what it needs by itself, says so first, and is safe to repeat.
#![forbid(unsafe_code)]

mod apt;
mod arch;
mod archive;
mod bpf;
mod build;
mod doctor;
mod fresh;
mod host;
mod kernels;
mod product;
mod rings;
mod setup;
mod sh;
mod table;
mod verify;
mod version;

use anyhow::{Result, bail};
use setup::Need;

fn main() {
    sh::catch_interrupts();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let code = match dispatch(&args) {
        Ok(()) => 0,
        Err(_) if sh::interrupted() => {
            eprintln!("interrupted");
            130
        }
        Err(error) => {
            eprintln!("{} {error:#}", sh::red("error:"));
            1
        }
    };
    build::abandon();
    std::process::exit(code);
}

fn dispatch(args: &[String]) -> Result<()> {
    let (command, rest) = match args.split_first() {
        Some((command, rest)) => (command.as_str(), rest),
        None => ("help", args),
    };
    if rest.iter().any(|a| a == "-h" || a == "--help") && !matches!(command, "demo" | "bench") {
        print!("{HELP}");
        return Ok(());
    }
    match command {
        "setup" => {
            no_arguments(command, rest)?;
            setup::ensure(Need::ALL)?;
            println!("Everything is in place. Next: `cargo xtask build`, `cargo xtask demo`.");
            Ok(())
        }
        "build" => build::command(flag(command, rest, "--release")?),
        "test" => {
            no_arguments(command, rest)?;
            rings::test()
        }
        "e2e" => rings::e2e(rest),
        "kernels" => kernels::command(rest),
        "verify" => verify::command(flag(command, rest, "--bless")?),
        "arch" => {
            no_arguments(command, rest)?;
            arch::command()
        }
        "demo" => product::demo(rest),
        "bench" => product::bench(rest),
        "fresh" => fresh::command(flag(command, rest, "--keep")?),
        "doctor" => {
            no_arguments(command, rest)?;
            doctor::command()
        }
        "help" | "-h" | "--help" => {
            print!("{HELP}");
            Ok(())
        }
        unknown => bail!("there is no command `{unknown}`.\n\n{HELP}"),
    }
}

fn no_arguments(command: &str, rest: &[String]) -> Result<()> {
    match rest.first() {
        None => Ok(()),
        Some(extra) => bail!("`cargo xtask {command}` takes no arguments, but got `{extra}`"),
    }
}

/// The one flag a command may be given.
fn flag(command: &str, rest: &[String], name: &str) -> Result<bool> {
    match rest {
        [] => Ok(false),
        [only] if only == name => Ok(true),
        _ => bail!("`cargo xtask {command}` takes only `{name}`, but got `{}`", rest.join(" ")),
    }
}

const HELP: &str = "\
cargo xtask COMMAND

  demo              see it work: two nodes, policies, flows, services (root)
  setup             install what is missing: BPF toolchain, bpf-linker, etcd, test programs
  doctor            what is here, what is missing, how to get it, what the kernel can do
  build [--release] the BPF object and the one binary, `cirri`

  test              format, lints, architecture, and all three rings of tests (root)
  e2e [FILTER]      ring 3 alone: real agents in network namespaces (root)
  verify [--bless]  the verifier's bill for each program, against verify/budget.toml (root)
  kernels [--load] [--bless] [VERSION, FILE.deb or STEP]…
                    the same, fixtures, pods, services and `lb` on Debian's Linux 6.1 and 6.12,
                    under qemu, against verify/linux-VERSION.toml (root)
  arch              do the crates depend on each other as ARCHITECTURE.md says?
  bench [ARGS]      measure; writes docs/bench (root)
  fresh [--keep]    set-up and the demo on a Debian of its own with an old package index (root; an hour)

Every command first sets up what it needs and says what it is about to install.

Environment:
  CIRRI_BPF_TOOLCHAIN  which Rust compiles the BPF programs: `debian` for /usr/bin/rustc,
                       or the name of a rustup toolchain that has the rust-src component
";

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(args: &[&str]) -> Vec<String> {
        args.iter().map(|a| (*a).to_owned()).collect()
    }

    #[test]
    fn a_command_takes_its_flag_and_nothing_else() {
        assert!(!flag("build", &[], "--release").unwrap());
        assert!(flag("build", &strings(&["--release"]), "--release").unwrap());
        assert!(flag("build", &strings(&["--relaese"]), "--release").is_err());
        assert!(no_arguments("test", &strings(&["x"])).is_err());
    }

    #[test]
    fn an_unknown_command_is_answered_with_the_help() {
        let error = dispatch(&strings(&["tset"])).unwrap_err().to_string();
        assert!(error.contains("tset") && error.contains("cargo xtask COMMAND"), "{error}");
    }
}
