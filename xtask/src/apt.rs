//! Debian's package manager: what it offers, and putting that there.

use crate::archive::{self, Offers};
use crate::{host, sh};
use anyhow::{Context, Result, bail};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Can this machine install packages at all? `Err` says why not.
pub fn available() -> Result<(), &'static str> {
    if host::which("apt-get").is_none() {
        Err("this machine has no apt-get")
    } else if !host::is_root() {
        Err("you are not root")
    } else {
        Ok(())
    }
}

/// The command a person types to get `packages`.
pub fn command_line(packages: &[String]) -> String {
    let sudo = if host::is_root() { "" } else { "sudo " };
    format!("{sudo}apt-get update && {sudo}apt-get install -y --no-install-recommends {}", packages.join(" "))
}

/// What the archive, as this machine last saw it, has of these packages.
pub fn offers(packages: &[&str]) -> Offers {
    let text = sh::capture(Command::new("apt-cache").arg("policy").args(packages).env("LC_ALL", "C"));
    archive::read(&text.unwrap_or_default())
}

/// Does the archive, as this machine last saw it, offer `package`?
pub fn offers_any(package: &str) -> bool {
    offers(&[package]).get(package).is_some_and(|offer| offer.candidate.is_some())
}

/// The LLVM that a package depends on.
pub fn llvm_of(package: &str) -> Option<u32> {
    let text = sh::capture(Command::new("apt-cache").args(["show", "--no-all-versions", package])).ok()?;
    archive::llvm_in(&text)
}

/// Asks the archive what it has by now; whether that went wholly well. A source that does not answer is no error
/// here: what matters is whether what is needed can be had, and that is looked at next.
pub fn refresh() -> Result<bool> {
    wait_for(Path::new(LISTS_LOCK), PATIENCE);
    let fresh = sh::status(apt_get().args(["update", "-q", "-o", "APT::Update::Error-Mode=any"]))?.success();
    if !fresh {
        eprintln!("The package index could not be refreshed wholly; going on with what there is of it.");
    }
    Ok(fresh)
}

/// Installs these packages (or `NAME=VERSION`), newer ones over older ones, without letting their services start.
pub fn install(packages: &[String]) -> Result<()> {
    wait_for(Path::new(ARCHIVES_LOCK), PATIENCE);
    let _quiet = NoServices::new(Path::new(POLICY))?;
    let mut command = apt_get();
    command.arg("install").args(OPTIONS);
    if packages.iter().any(|package| package.contains('=')) {
        command.arg("--allow-downgrades"); // A version was chosen because no other will do.
    }
    sh::run(command.args(packages))
        .with_context(|| format!("packages could not be installed. Once that is mended: {}", command_line(packages)))
}

const OPTIONS: [&str; 8] = [
    "-y",
    "--no-install-recommends",
    "-o",
    "DPkg::Lock::Timeout=300",
    "-o",
    "Dpkg::Use-Pty=0",
    "-o",
    "Acquire::Retries=3",
];

/// Of these two locks apt-get does not wait for the one who has them: `DPkg::Lock::Timeout` is about dpkg's.
const LISTS_LOCK: &str = "/var/lib/apt/lists/lock";
const ARCHIVES_LOCK: &str = "/var/cache/apt/archives/lock";
/// As long as for dpkg's lock.
const PATIENCE: Duration = Duration::from_secs(300);
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Waits until nobody has a lock of apt's, as the system's own refresh has after a start; whether that came to pass. What
/// cannot be asked is left to apt-get, which says why.
fn wait_for(lock: &Path, patience: Duration) -> bool {
    let began = Instant::now();
    let mut told = false;
    // A lock of a file as apt's ends with any descriptor of it, so it is not kept.
    let is_held = || {
        let file = std::fs::OpenOptions::new().write(true).open(lock);
        file.is_ok_and(|file| {
            let held = rustix::fs::fcntl_lock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive);
            matches!(held, Err(rustix::io::Errno::AGAIN | rustix::io::Errno::ACCESS))
        })
    };
    while is_held() {
        if began.elapsed() > patience {
            return false;
        }
        if !std::mem::replace(&mut told, true) {
            eprintln!("Another package manager is at work; waiting for it, {} s at the most.", patience.as_secs());
        }
        std::thread::sleep(LOOK_AGAIN);
    }
    true
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").env("PATH", host::search_path()).stdin(Stdio::null());
    command.arg("-q");
    command
}

/// While it lives, installing a package does not start its service. A policy that is already there
/// is somebody's decision: it stays, unless a run that was cut left it.
struct NoServices {
    ours: Option<PathBuf>,
}

const POLICY: &str = "/usr/sbin/policy-rc.d";
const OUR_POLICY: &str =
    "#!/bin/sh\n# Made by `cargo xtask setup` while it installs packages. Remove it if that is over.\nexit 101\n";

impl NoServices {
    fn new(policy: &Path) -> Result<Self> {
        let ours = Some(policy.to_owned());
        let mut file = match std::fs::OpenOptions::new().write(true).create_new(true).mode(0o755).open(policy) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                let is_left = std::fs::read_to_string(policy).is_ok_and(|text| OUR_POLICY.starts_with(&text));
                return Ok(Self { ours: ours.filter(|_| is_left) });
            }
            Err(error) => {
                bail!("cannot write {}, which keeps services from starting: {error}", policy.display())
            }
        };
        let guard = Self { ours };
        std::io::Write::write_all(&mut file, OUR_POLICY.as_bytes())?;
        Ok(guard)
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if let Some(policy) = &self.ours
            && let Err(error) = std::fs::remove_file(policy)
        {
            let policy = policy.display();
            eprintln!("cannot remove {policy} ({error}): remove it, or no package will start its service");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_that_a_cut_run_left_goes_with_the_next_and_somebody_elses_stays() {
        let directory = std::env::temp_dir().join(format!("xtask-policy-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let policy = directory.join("policy-rc.d");
        let _cut = std::mem::ManuallyDrop::new(NoServices::new(&policy).unwrap());
        assert!(policy.exists());
        drop(NoServices::new(&policy).unwrap());
        assert!(!policy.exists(), "what a cut run left stays");
        std::fs::write(&policy, "#!/bin/sh\nexit 101\n# mine\n").unwrap();
        drop(NoServices::new(&policy).unwrap());
        assert!(policy.exists(), "somebody's decision is gone");
        std::fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn it_is_waited_for_who_has_a_lock_of_apts() {
        let lock = std::env::temp_dir().join(format!("xtask-lock-{}", std::process::id()));
        std::fs::write(&lock, "").unwrap();
        assert!(wait_for(&lock, Duration::ZERO) && wait_for(Path::new("/nowhere/lock"), Duration::ZERO));
        // As apt takes it: a lock of a record, by another process.
        let script = "use Fcntl; open(F, '+<', $ARGV[0]); \
                      my $lock = pack('s s l! l! i', F_WRLCK, 0, 0, 0, 0); fcntl(F, F_SETLK, $lock) or die; \
                      $| = 1; print qq(locked\n); <STDIN>;";
        let mut command = Command::new("perl");
        command.args(["-e", script]).arg(&lock).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut other = command.spawn().unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(other.stdout.take().unwrap()), &mut line).unwrap();
        assert_eq!(line, "locked\n");
        assert!(!wait_for(&lock, Duration::ZERO), "somebody has it");
        drop(other.stdin.take());
        assert!(wait_for(&lock, PATIENCE));
        other.wait().unwrap();
        std::fs::remove_file(&lock).unwrap();
    }
}
