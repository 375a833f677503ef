//! Processes of a lab: started in a namespace, remembered so that a recycled pid is never mistaken for them, stopped.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::Serialize;

use super::cgroup;
use super::netns::{self, NsId};
use crate::span;

/// How long killed processes may take to go. They are killed, not asked: only a stuck system call can hold them.
const KILL_TIMEOUT: Duration = Duration::from_secs(60);

/// As much of a script's first line as the kernel reads.
const LONGEST_LINE: u64 = 256;

/// One process, by pid and the time it started at: the pair is never used twice while the machine is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProcessId {
    /// The pid.
    pub pid: i32,
    /// When it started, in the kernel's clock ticks since boot.
    pub started: u64,
}

impl ProcessId {
    /// The process that has this pid now, or `None` when there is none (a zombie counts as gone).
    pub fn current(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (state, started) = parse_stat(&stat)?;
        (!matches!(state, 'Z' | 'X')).then_some(Self { pid, started })
    }

    /// Remembers it: the pid alone in `NAME.pid`, as others read such files, and when it started in `NAME.started`.
    ///
    /// # Errors
    /// The file system refused.
    fn record(self, path: &Path) -> anyhow::Result<()> {
        // The pid last: one without its start is believed by nobody.
        for (path, number) in [(path.with_extension("started"), self.started), (path.to_owned(), self.pid as u64)] {
            let text = format!("{number}\n");
            crate::files::write_atomic(&path, text.as_bytes())
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    /// Whether this very process still runs.
    pub fn alive(self) -> bool {
        Self::current(self.pid) == Some(self)
    }

    /// A descriptor that names this very process and becomes readable when it ends; `None` if it already has.
    pub fn open(self) -> Option<OwnedFd> {
        let fd = rustix::process::pidfd_open(Pid::from_raw(self.pid)?, PidfdFlags::empty()).ok()?;
        // Checked after opening: from here on the descriptor, not the number, names the process.
        self.alive().then_some(fd)
    }
}

/// Whether a program of this name is in `PATH`.
pub fn installed(program: &str) -> bool {
    found_in(&std::env::var_os("PATH").unwrap_or_default(), program)
}

fn found_in(path: &OsStr, program: &str) -> bool {
    std::env::split_paths(path).any(|directory| directory.join(program).is_file())
}

/// Why a program could not be started, whose file the kernel did not find: there may be one, and what it names to be
/// run by not.
pub fn not_found(program: &str, directory: &Path, path: &OsStr) -> String {
    let file = match program.contains('/') {
        true => Some(directory.join(program)).filter(|file| file.is_file()),
        false => std::env::split_paths(path).map(|place| place.join(program)).find(|file| file.is_file()),
    };
    let Some(file) = file else { return format!("{program} is not installed (not found in PATH)") };
    let mut first = Vec::new();
    // What is not text is no script.
    let _ = File::open(&file).and_then(|file| BufReader::new(file.take(LONGEST_LINE)).read_until(b'\n', &mut first));
    let line = String::from_utf8_lossy(&first);
    match line.strip_prefix("#!").and_then(|rest| rest.split_whitespace().next()) {
        Some(interpreter) => {
            format!("{program} is there, but {interpreter} is not, which its first line names to run it")
        }
        None => format!("{program} is there, but its loader is not (`readelf -l {}` names it)", file.display()),
    }
}

/// How to start a process.
pub struct Start<'a> {
    /// The namespace it runs in.
    pub netns: &'a Path,
    /// The control group it runs in, which is made if need be.
    pub cgroup: &'a Path,
    /// The program (looked up in PATH) and its arguments.
    pub argv: &'a [String],
    /// Environment variables on top of the inherited ones.
    pub env: &'a BTreeMap<String, String>,
    /// Its working directory.
    pub directory: &'a Path,
    /// Where standard output and standard error are appended to.
    pub log: &'a Path,
    /// Whether standard output goes to a pipe instead of the log (the readiness handshake of our own servers).
    pub pipe_stdout: bool,
}

impl Start<'_> {
    /// Starts it in a process group of its own, without standard input, and writes its id to `record`.
    ///
    /// # Errors
    /// The program is not found or cannot be started; the namespace is gone; the log or record cannot be written.
    pub fn spawn(&self, record: &Path) -> anyhow::Result<Child> {
        let (program, arguments) = self.argv.split_first().context("the command is empty")?;
        if !self.is_there(program) {
            bail!("{program} is not installed (not found in PATH): install it or change the command");
        }
        let log = append_to(self.log)?;
        cgroup::create(self.cgroup)?;
        let mut command = Command::new(own_binary()?);
        for name in variables_of_cirri() {
            command.env_remove(name);
        }
        command
            .args(["lab", "__in"])
            .arg(self.cgroup)
            .args(["--", program])
            .args(arguments)
            .envs(self.env)
            .current_dir(self.directory)
            .process_group(0)
            .stdin(Stdio::null())
            .stderr(log.try_clone()?)
            .stdout(if self.pipe_stdout { Stdio::piped() } else { Stdio::from(log) });
        let mut child =
            netns::within(self.netns, || command.spawn())?.with_context(|| format!("cannot start {program}"))?;
        let id = child.id().try_into().ok().and_then(ProcessId::current);
        if let Some(Err(error)) = id.map(|id| id.record(record)) {
            // A program that no record names would be found by nobody.
            let _ = child.kill().and_then(|()| child.wait());
            return Err(error);
        }
        Ok(child)
    }

    /// Whether the program can be started, as far as that can be known before.
    fn is_there(&self, program: &str) -> bool {
        if program.contains('/') {
            return self.directory.join(program).is_file();
        }
        let path = self.env.get("PATH").map(OsString::from).or_else(|| std::env::var_os("PATH"));
        found_in(&path.unwrap_or_default(), program)
    }
}

/// The variables that configure a program of Cirri. Those of the caller's environment are meant for its own agent or
/// load balancer; they would override what a lab's agents are told by their file.
fn variables_of_cirri() -> impl Iterator<Item = OsString> {
    std::env::vars_os().map(|(name, _)| name).filter(|name| name.as_encoded_bytes().starts_with(b"CIRRI_"))
}

/// This very program, to be started again.
///
/// # Errors
/// Its path is not known.
pub fn own_binary() -> anyhow::Result<String> {
    let path = std::env::current_exe().context("cannot find the path of this program")?;
    // Replaced by an upgrade or a build meanwhile: the kernel still has what this process runs.
    let path = if path.exists() { path } else { "/proc/self/exe".into() };
    path.into_os_string().into_string().map_err(|path| anyhow::anyhow!("the path {path:?} is not valid text"))
}

/// Kills these processes and waits until they are gone.
///
/// # Errors
/// Some did not go in time.
pub fn kill(ids: &[ProcessId]) -> anyhow::Result<()> {
    if end(ids, Signal::KILL, KILL_TIMEOUT) {
        return Ok(());
    }
    let stuck: Vec<String> = ids.iter().filter(|id| id.alive()).map(|id| id.pid.to_string()).collect();
    let stuck = stuck.join(",");
    bail!("process {stuck} does not end although it was killed: see `ps -o stat,wchan {stuck}`")
}

/// Sends these processes a signal and waits until they are gone; whether they went in time.
pub fn end(ids: &[ProcessId], signal: Signal, within: Duration) -> bool {
    let open: Vec<OwnedFd> = ids.iter().filter_map(|id| id.open()).collect();
    for fd in &open {
        // An error means that it ended by itself meanwhile.
        let _ = rustix::process::pidfd_send_signal(fd, signal);
    }
    let deadline = span::from_now(within);
    open.iter().all(|fd| {
        let left = deadline.saturating_duration_since(Instant::now());
        first_readable(&[fd.as_fd()], left).is_some()
    })
}

/// Kills these processes and all of their process groups, then waits until the leaders are gone. Each leads the group
/// it was started in, see [`Start::spawn`].
///
/// # Errors
/// Some did not go in time.
pub fn kill_groups(leaders: &[ProcessId]) -> anyhow::Result<()> {
    for leader in leaders {
        // While the leader lives, the group's number is its pid and nobody else's.
        if let (Some(_open), Some(group)) = (leader.open(), Pid::from_raw(leader.pid)) {
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
        }
    }
    kill(leaders)
}

/// Every process that lives in one of these namespaces, this one excepted.
pub fn inside(namespaces: &[NsId]) -> Vec<ProcessId> {
    let own = std::process::id();
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| i64::from(*pid) != i64::from(own))
        .filter(|pid| netns::id(Path::new(&format!("/proc/{pid}/ns/net"))).is_some_and(|id| namespaces.contains(&id)))
        .filter_map(ProcessId::current)
        .collect()
}

/// The process remembered in `record`, if it still runs.
pub fn recorded(record: &Path) -> Option<ProcessId> {
    let pid = fs::read_to_string(record).ok()?.trim().parse().ok()?;
    let started = fs::read_to_string(record.with_extension("started")).ok()?.trim().parse().ok()?;
    let id = ProcessId { pid, started };
    id.alive().then_some(id)
}

/// Every process remembered in a `.pid` file below `directory` that still runs.
pub fn recorded_below(directory: &Path) -> Vec<ProcessId> {
    let mut found = Vec::new();
    let mut pending = vec![directory.to_path_buf()];
    while let Some(directory) = pending.pop() {
        let Ok(entries) = fs::read_dir(&directory) else { continue };
        for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            // A symbolic link is never followed: programs of pods may write into their directories.
            let Ok(meta) = fs::symlink_metadata(&path) else { continue };
            if meta.is_dir() {
                pending.push(path);
            } else if meta.is_file() && path.extension().is_some_and(|extension| extension == "pid") {
                found.extend(recorded(&path));
            }
        }
    }
    found
}

/// Replaces `path` by the JSON of `value` in one step, so that nobody ever reads half of it.
///
/// # Errors
/// The file system refused: full, read-only, no such directory.
pub fn write_json(path: &Path, value: &impl Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_vec_pretty(value)?;
    text.push(b'\n');
    crate::files::write_atomic(path, &text).with_context(|| format!("cannot write {}", path.display()))
}

/// Opens a log for appending, making it if need be.
///
/// # Errors
/// The file cannot be opened.
pub fn append_to(log: &Path) -> anyhow::Result<File> {
    OpenOptions::new().create(true).append(true).open(log).with_context(|| format!("cannot open {}", log.display()))
}

/// Which of these descriptors becomes readable first; `None` when none does in time.
pub fn first_readable(fds: &[BorrowedFd<'_>], within: Duration) -> Option<usize> {
    let deadline = span::from_now(within);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = rustix::event::Timespec {
            tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut polled: Vec<PollFd<'_>> = fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        match rustix::event::poll(&mut polled, Some(&timeout)) {
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return None,
            Ok(_) => return polled.iter().position(|fd| !fd.revents().is_empty()),
        }
    }
}

/// State and start time from `/proc/<pid>/stat`. The program's name comes before them and may hold anything, brackets
/// included, so that counting starts behind the last one.
fn parse_stat(stat: &str) -> Option<(char, u64)> {
    let rest = stat.get(stat.rfind(')')? + 1..)?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    // Field 3 was the state; the start time is field 22.
    let started = fields.nth(18)?.parse().ok()?;
    Some((state, started))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_name_with_brackets_does_not_shift_the_fields() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 1 2";
        assert_eq!(parse_stat(stat), Some(('S', 987_654)));
    }

    #[test]
    fn a_pid_file_is_a_number_and_one_of_another_start_is_nobodys() {
        let own = ProcessId::current(std::process::id().try_into().unwrap()).unwrap();
        let path = std::env::temp_dir().join(format!("cirri-pid-{}/agent.pid", own.pid));
        own.record(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n", own.pid));
        assert_eq!((recorded(&path), recorded_below(path.parent().unwrap())), (Some(own), vec![own]));
        fs::write(path.with_extension("started"), "1").unwrap();
        assert_eq!(recorded(&path), None);
        fs::remove_dir_all(path.parent().unwrap()).unwrap();
    }

    #[test]
    fn a_program_that_is_there_and_cannot_be_run_is_not_called_missing() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("script"), "#! /nowhere/python3 -u\n").unwrap();
        fs::write(directory.path().join("program"), b"\x7fELF\x02").unwrap();
        let why = |program: &str| not_found(program, directory.path(), directory.path().as_os_str());
        for script in ["script", "./script"] {
            assert!(why(script).contains("is there, but /nowhere/python3 is not"), "{}", why(script));
        }
        assert!(why("program").contains("its loader"), "{}", why("program"));
        assert!(why("./none").contains("not installed"), "{}", why("./none"));
    }

    #[test]
    fn a_zombie_and_another_start_time_count_as_gone() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id().try_into().unwrap();
        let id = ProcessId::current(pid).unwrap();
        assert!(id.alive());
        assert!(!ProcessId { started: id.started + 1, ..id }.alive());
        kill(&[id]).unwrap();
        assert!(!id.alive(), "killed, not yet reaped");
        child.wait().unwrap();
        assert_eq!(id.open().map(drop), None);
    }
}
