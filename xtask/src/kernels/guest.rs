//! The guest: what its first process does, how it is run, what its console says.

use super::image::Kernel;
use super::steps::Step;
use crate::{host, sh};
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// How lines start that say where the guest is.
const MARK: &str = "@kernels ";
/// How a step says that a part of it is done; tests print it.
const PART: &str = "@part ";
/// Real time that a guest may take before it is ended.
const LIMIT: Duration = Duration::from_secs(5400);

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
    /// Exit code, and seconds of the guest's clock.
    end: Option<(i32, u32)>,
    /// What it took on this machine.
    took: Duration,
}

impl Outcome {
    /// The exit code of a step or part, if it came to its end.
    pub fn code(&self, step: &str) -> Option<i32> {
        self.steps.get(step)?.end.map(|(code, _)| code)
    }

    /// How long it took: by the guest's clock, and on this machine.
    pub fn times(&self, step: &str) -> Option<(u32, Duration)> {
        let said = self.steps.get(step)?;
        said.end.map(|(_, seconds)| (seconds, said.took))
    }

    /// What a step that went well printed.
    pub fn printed(&self, step: &str) -> Option<&str> {
        self.steps.get(step).filter(|said| matches!(said.end, Some((0, _)))).map(|said| said.text.as_str())
    }
}

/// Boots the kernel on the file system and waits until the guest is over. `show` sees each line of its console.
pub fn run(kernel: &Kernel, image: &Path, show: impl Fn(&str)) -> Result<Outcome> {
    let log = image.with_file_name("console.log");
    let mut file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let mut qemu = qemu(kernel, image);
    let mut child = qemu.spawn().with_context(|| format!("cannot start `{}`", sh::line(&qemu)))?;
    let console = child.stdout.take().context("qemu has no console")?;
    let (lines, begun, mut read) = (follow(console), Instant::now(), Reader::default());
    let ended = loop {
        match lines.recv_timeout(Duration::from_millis(200)) {
            Ok(line) => {
                show(&line);
                writeln!(file, "{line}").with_context(|| format!("cannot write {}", log.display()))?;
                read.line(&line, begun.elapsed());
            }
            Err(RecvTimeoutError::Disconnected) => break Ok(()),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if sh::interrupted() {
            break Err("interrupted".to_owned());
        }
        if begun.elapsed() > LIMIT {
            break Err(format!("took more than {} minutes and was ended", LIMIT.as_secs() / 60));
        }
    };
    if ended.is_err() {
        // It may have ended by itself in between.
        let _ = child.kill();
    }
    let status = child.wait().context("lost sight of qemu")?;
    let fault = ended.err().or_else(|| (!status.success()).then(|| format!("qemu ended with {status}")));
    if let Some(fault) = fault {
        bail!("Linux {}: {fault}; the console is in {}", kernel.release, log.display());
    }
    Ok(Outcome { steps: read.steps, log })
}

/// Without acceleration: kernels of other machines do not boot under every host's. The guest's clock counts its
/// instructions, one a nanosecond, so that no limit inside it depends on how busy this machine is. It ends with
/// whoever waits for it.
fn qemu(kernel: &Kernel, image: &Path) -> Command {
    let mut qemu = Command::new("setpriv");
    qemu.args(["--pdeathsig", "KILL", "qemu-system-x86_64", "-accel", "tcg,thread=single"])
        .args(["-icount", "shift=0,sleep=off"])
        .args(["-cpu", "max", "-m", "3G", "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(image)
        // What hardens a kernel and is not looked at here costs much without acceleration.
        .args([
            "-append",
            "console=ttyS0 quiet loglevel=1 rdinit=/init panic=-1 mitigations=off nokaslr init_on_alloc=0",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .env("PATH", host::search_path());
    qemu
}

/// The lines of a console, as they come.
fn follow(console: ChildStdout) -> Receiver<String> {
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        let (mut reader, mut bytes) = (BufReader::new(console), Vec::new());
        while reader.read_until(b'\n', &mut bytes).is_ok_and(|n| n > 0) {
            let line = String::from_utf8_lossy(&bytes).trim_end().to_owned();
            if sender.send(line).is_err() {
                return; // Nobody listens any more.
            }
            bytes.clear();
        }
    });
    lines
}

/// Takes a console apart.
#[derive(Default)]
struct Reader {
    steps: BTreeMap<String, Said>,
    /// The step that is at work, and since when.
    now: Option<(String, Duration)>,
    /// When its last part ended.
    part: Duration,
}

impl Reader {
    fn line(&mut self, line: &str, at: Duration) {
        if let Some((_, part)) = line.split_once(PART) {
            if let Some((name, seconds)) = part.split_once(' ') {
                let end = seconds.parse().ok().map(|seconds| (0, seconds));
                let took = at.saturating_sub(self.part);
                self.part = at;
                self.steps.insert(name.to_owned(), Said { end, took, ..Said::default() });
            }
            return;
        }
        let Some(mark) = line.strip_prefix(MARK) else {
            if let Some(said) = self.now.as_ref().and_then(|(name, _)| self.steps.get_mut(name)) {
                said.text.push_str(line);
                said.text.push('\n');
            }
            return;
        };
        let words: Vec<&str> = mark.split(' ').collect();
        match words.as_slice() {
            ["begin", name] => {
                self.steps.insert((*name).to_owned(), Said::default());
                self.now = Some(((*name).to_owned(), at));
                self.part = at;
            }
            ["end", name, code, seconds] => {
                if let Some(said) = self.steps.get_mut(*name) {
                    said.end = code.parse().ok().zip(seconds.parse().ok());
                    said.took = at.saturating_sub(self.now.take().map_or(at, |(_, begun)| begun));
                }
            }
            _ => self.now = None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(console: &str) -> Outcome {
        let mut reader = Reader::default();
        console.lines().zip(0..).for_each(|(line, second)| reader.line(line, Duration::from_secs(second)));
        Outcome { steps: reader.steps, log: PathBuf::new() }
    }

    #[test]
    fn the_console_tells_what_each_step_printed_and_how_it_ended() {
        let outcome =
            read("noise\n@kernels begin load\n[{\"name\":1}]\n@kernels end load 0 12\nnoise\n@kernels begin pod\nx\n");
        assert_eq!(outcome.printed("load"), Some("[{\"name\":1}]\n"));
        assert_eq!((outcome.code("load"), outcome.times("load")), (Some(0), Some((12, Duration::from_secs(2)))));
        assert_eq!((outcome.code("pod"), outcome.printed("pod"), outcome.code("lb")), (None, None, None));
    }

    #[test]
    fn parts_of_a_step_are_told_by_it() {
        let outcome = read("@kernels begin node\ntest a ... @part pod 3\nx\n@part policy 4\n@kernels end node 101 9\n");
        assert_eq!(outcome.times("pod"), Some((3, Duration::from_secs(1))));
        assert_eq!(outcome.times("policy"), Some((4, Duration::from_secs(2))));
        assert_eq!((outcome.code("node"), outcome.code("service")), (Some(101), None));
    }

    #[test]
    fn the_script_says_where_it_is() {
        let text = script(&super::super::steps::STEPS.iter().collect::<Vec<_>>());
        assert!(text.contains("@kernels begin load") && text.contains("@kernels end lb $code"), "{text}");
    }
}
