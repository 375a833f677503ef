//! The guest: what its first process does, how it is run, what its console says.

use super::image::Kernel;
use super::steps::Step;
use crate::{host, sh};
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// How lines start that say where the guest is.
const MARK: &str = "@kernels ";
/// Real time that a guest may take before it is ended, in seconds.
const LIMIT: u32 = 5400;

/// What the guest's first process runs.
pub fn script(steps: &[&Step]) -> String {
    let mut text = BEGIN.to_owned();
    for step in steps {
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "echo '{MARK}begin {name}'\nstarted=$(cut -d. -f1 /proc/uptime)\n(busybox timeout {limit} sh -c '{line}') 2>&1\n\
             code=$?\necho \"{MARK}end {name} $code $(($(cut -d. -f1 /proc/uptime) - started))\"\n",
            name = step.name,
            limit = step.limit,
            line = step.line
        );
    }
    text.push_str(END);
    text
}

const BEGIN: &str = "\
#!/bin/busybox sh
/bin/busybox --install -s /applets
export PATH=/usr/sbin:/usr/bin:/sbin:/bin:/applets HOME=/root CIRRI_BIN=/bin/cirri RUST_BACKTRACE=0 NO_COLOR=1
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts /run /tmp
mount -t devpts devpts /dev/pts
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
dmesg -n 1
for module in $(cat /modules.wanted); do modprobe $module || echo \"no module $module\"; done
ip link set lo up
hostname guest
";

const END: &str = "\
echo '@kernels over'
sync
poweroff -f
";

/// What a guest's console said.
pub struct Outcome {
    /// Where all of it is.
    pub log: PathBuf,
    steps: BTreeMap<String, Said>,
}

#[derive(Default)]
struct Said {
    text: String,
    /// Exit code and seconds of the guest's clock.
    end: Option<(i32, u32)>,
}

impl Outcome {
    /// The exit code of a step, if it came to its end.
    pub fn code(&self, step: &str) -> Option<i32> {
        self.steps.get(step)?.end.map(|(code, _)| code)
    }

    /// How long it took.
    pub fn seconds(&self, step: &str) -> Option<u32> {
        self.steps.get(step)?.end.map(|(_, seconds)| seconds)
    }

    /// What a step that went well printed.
    pub fn printed(&self, step: &str) -> Option<&str> {
        self.steps.get(step).filter(|said| matches!(said.end, Some((0, _)))).map(|said| said.text.as_str())
    }
}

/// Boots the kernel on the file system and waits until the guest is over.
pub fn run(kernel: &Kernel, image: &Path) -> Result<Outcome> {
    let mut console = String::new();
    // Without acceleration: kernels of other machines do not boot under every host's. The guest's clock counts its
    // instructions, one a nanosecond, so that no limit inside it depends on how busy this machine is.
    let mut qemu = Command::new("timeout");
    qemu.args(["--signal=KILL", &LIMIT.to_string(), "qemu-system-x86_64", "-accel", "tcg,thread=single"])
        .args(["-icount", "shift=0,sleep=off"])
        .args(["-cpu", "max", "-m", "3G", "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(image)
        .args(["-append", "console=ttyS0 quiet loglevel=1 rdinit=/init panic=-1 mitigations=off nokaslr"])
        .stdin(std::process::Stdio::null())
        .env("PATH", host::search_path());
    let status = sh::stream(&mut qemu, |line| {
        console.push_str(line.trim_end_matches('\r'));
        console.push('\n');
    })?;
    let log = image.with_file_name("console.log");
    std::fs::write(&log, &console).with_context(|| format!("cannot write {}", log.display()))?;
    if !status.success() {
        bail!("Linux {}: qemu ended with {status}; the console is in {}", kernel.release, log.display());
    }
    Ok(Outcome { steps: read(&console), log })
}

fn read(console: &str) -> BTreeMap<String, Said> {
    let mut steps: BTreeMap<String, Said> = BTreeMap::new();
    let mut now = None;
    for line in console.lines() {
        let Some(mark) = line.strip_prefix(MARK) else {
            if let Some(said) = now.as_ref().and_then(|name| steps.get_mut(name)) {
                said.text.push_str(line);
                said.text.push('\n');
            }
            continue;
        };
        let words: Vec<&str> = mark.split(' ').collect();
        match words.as_slice() {
            ["begin", name] => {
                steps.insert((*name).to_owned(), Said::default());
                now = Some((*name).to_owned());
            }
            ["end", name, code, seconds] => {
                if let Some(said) = steps.get_mut(*name) {
                    said.end = code.parse().ok().zip(seconds.parse().ok());
                }
                now = None;
            }
            _ => now = None,
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_console_tells_what_each_step_printed_and_how_it_ended() {
        let console =
            "noise\n@kernels begin load\n[{\"name\":1}]\n@kernels end load 0 12\nnoise\n@kernels begin pod\nx\n";
        let outcome = Outcome { steps: read(console), log: PathBuf::new() };
        assert_eq!(outcome.printed("load"), Some("[{\"name\":1}]\n"));
        assert_eq!((outcome.code("load"), outcome.seconds("load")), (Some(0), Some(12)));
        assert_eq!((outcome.code("pod"), outcome.printed("pod"), outcome.code("lb")), (None, None, None));
    }

    #[test]
    fn the_script_says_where_it_is() {
        let text = script(&super::super::steps::STEPS.iter().collect::<Vec<_>>());
        assert!(text.contains("@kernels begin load") && text.contains("@kernels end pod $code"), "{text}");
    }
}
