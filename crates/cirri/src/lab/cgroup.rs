//! Control groups of a lab (version 2): one for each node, and in it one for each of its pods.
//!
//! A node's agent attaches its socket programs to the node's group, as it would to the whole hierarchy of a machine
//! that it has to itself. A socket belongs to the group that its process was in when it made the socket, so that a
//! program is moved before it starts, never after: by the hidden command `cirri lab __in`.
//!
//! | group, below the hierarchy's root | who lives there |
//! |---|---|
//! | `cirri-lab-<lab>/<node>` | programs of the host: the agent, `lab exec --node`, probes from the node and its pods |
//! | `cirri-lab-<lab>/<node>/<namespace>_<pod>` | a pod's programs, `lab exec` into it |
//! | `cirri-lab-<lab>/net`, `cirri-lab-<lab>/world` | etcd; the host outside |

use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::fs::inotify;

use super::process::{self, ProcessId};
use super::state::{LabName, PodRecord};
use crate::output;

const MOUNTS: &str = "/proc/self/mountinfo";
/// The file that lists a group's processes and takes new ones.
const PROCESSES: &str = "cgroup.procs";
/// How long ended processes may take to leave their group.
const EMPTY_TIMEOUT: Duration = Duration::from_secs(60);
/// After how long it is looked whether another one has entered.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// The shells' exit code for a program that is not there.
const EXIT_NOT_FOUND: u8 = 127;

/// Arguments of the hidden command that becomes a program inside a group.
#[derive(Debug, clap::Args)]
pub struct InArgs {
    /// The group's directory.
    group: PathBuf,
    /// The program and its arguments.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// Where a lab's groups are.
///
/// # Errors
/// The machine has no hierarchy of version 2.
pub fn of_lab(lab: &LabName) -> anyhow::Result<PathBuf> {
    Ok(hierarchy()?.join(format!("cirri-lab-{lab}")))
}

/// The group of a node, of `net` or of `world`.
///
/// # Errors
/// As for [`of_lab`].
pub fn of(lab: &LabName, place: &str) -> anyhow::Result<PathBuf> {
    Ok(of_lab(lab)?.join(place))
}

/// The group of a pod.
///
/// # Errors
/// As for [`of_lab`].
pub fn of_pod(lab: &LabName, pod: &PodRecord) -> anyhow::Result<PathBuf> {
    Ok(of(lab, &pod.node)?.join(pod.key.file_name()))
}

/// Makes a group, and those above it.
///
/// # Errors
/// What the kernel refused.
pub fn create(group: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(group).with_context(|| format!("cannot make the control group {}", group.display()))
}

/// Makes a group in one that is there, as those of nodes are while their lab is up: nothing of one that is being taken
/// down comes back.
///
/// # Errors
/// What the kernel refused.
pub fn add(group: &Path) -> anyhow::Result<()> {
    match fs::create_dir(group) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(error).with_context(|| format!("cannot make the control group {} (is its lab up?)", group.display()))
        }
        _ => Ok(()),
    }
}

/// Moves this process into a group; its programs and sockets from now on belong there.
///
/// # Errors
/// What the kernel refused.
pub fn enter(group: &Path) -> anyhow::Result<()> {
    fs::write(group.join(PROCESSES), "0").with_context(|| format!("cannot enter the control group {}", group.display()))
}

/// Becomes the program, inside the group.
///
/// # Errors
/// The group cannot be entered, or the program not started.
pub fn run(args: InArgs) -> anyhow::Result<ExitCode> {
    enter(&args.group)?;
    let (program, arguments) = args.command.split_first().context("which program?")?;
    let error = Command::new(program).args(arguments).exec();
    if error.kind() == io::ErrorKind::NotFound {
        let path = std::env::var_os("PATH").unwrap_or_default();
        output::complain(&process::not_found(program, Path::new("."), &path));
        return Ok(ExitCode::from(EXIT_NOT_FOUND));
    }
    Err(error).with_context(|| format!("cannot start {program}"))
}

/// Every process in a group and those below it, this one excepted.
pub fn inside(group: &Path) -> Vec<ProcessId> {
    let own = std::process::id();
    let mut found = Vec::new();
    for group in tree(group) {
        let text = fs::read_to_string(group.join(PROCESSES)).unwrap_or_default();
        let pids = text.lines().filter_map(|line| line.parse::<i32>().ok());
        found.extend(pids.filter(|pid| i64::from(*pid) != i64::from(own)).filter_map(ProcessId::current));
    }
    found
}

/// Kills who lives in a group or in those below it, and removes them: up to then others may enter one, or make one
/// below. One that is not there is no error.
///
/// # Errors
/// What the kernel refused.
pub fn remove(group: &Path) -> anyhow::Result<()> {
    let deadline = Instant::now() + EMPTY_TIMEOUT;
    loop {
        process::kill(&inside(group))?;
        let Err((busy, error)) = remove_tree(group) else { return Ok(()) };
        if error.kind() != io::ErrorKind::ResourceBusy || Instant::now() >= deadline {
            return Err(error).with_context(|| format!("cannot remove the control group {}", busy.display()));
        }
        match await_empty(&busy, LOOK_AGAIN) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot watch the control group {}", busy.display()));
            }
            _ => {}
        }
    }
}

/// Removes groups in which nobody lives; the first that cannot be, and why.
fn remove_tree(group: &Path) -> Result<(), (PathBuf, io::Error)> {
    for group in tree(group).into_iter().rev() {
        match fs::remove_dir(&group) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err((group, error)),
            _ => {}
        }
    }
    Ok(())
}

/// Waits until nothing lives in a group, but not for ever: a process that has ended leaves it a moment after its parent
/// hears of it, and that makes an event; one that enters makes none.
fn await_empty(group: &Path, patience: Duration) -> io::Result<()> {
    let file = group.join("cgroup.events");
    // Watched before the first look: a change in between is then not missed.
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC)?;
    inotify::add_watch(&watch, &file, inotify::WatchFlags::MODIFY)?;
    let deadline = Instant::now() + patience;
    let mut space = [MaybeUninit::uninit(); 512];
    while fs::read_to_string(&file)?.lines().any(|line| line == "populated 1") {
        let left = deadline.saturating_duration_since(Instant::now());
        if process::first_readable(&[watch.as_fd()], left).is_none() {
            return Ok(());
        }
        inotify::Reader::new(&watch, &mut space).next()?;
    }
    Ok(())
}

/// A group and all below it, those above before those below.
fn tree(group: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    let mut pending = vec![group.to_owned()];
    while let Some(group) = pending.pop() {
        let entries = fs::read_dir(&group).into_iter().flatten().flatten();
        pending.extend(entries.filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())).map(|e| e.path()));
        all.push(group);
    }
    all
}

/// Where version 2 is mounted.
///
/// # Errors
/// Nowhere.
pub fn hierarchy() -> anyhow::Result<PathBuf> {
    let mounts = fs::read_to_string(MOUNTS).with_context(|| format!("cannot read {MOUNTS}"))?;
    mounts.lines().find_map(version_2).context(
        "no control groups of version 2 are mounted, which services need: `mount -t cgroup2 none /sys/fs/cgroup/unified`",
    )
}

/// The mount point of a line of `mountinfo`, if it is a hierarchy of version 2.
fn version_2(line: &str) -> Option<PathBuf> {
    // Optional fields make the first part vary in length; the type is the first word after them.
    let (place, kind) = line.split_once(" - ")?;
    (kind.split(' ').next()? == "cgroup2").then(|| place.split(' ').nth(4).map(|path| PathBuf::from(unescape(path))))?
}

/// `\040` is how the kernel writes a space, and so on.
fn unescape(path: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(path.to_owned(), |path, (written, meant)| path.replace(written, meant))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hierarchy_is_found_among_mounts_with_and_without_optional_fields() {
        let line = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw";
        assert_eq!(version_2(line), Some("/sys/fs/cgroup/unified".into()));
        let line = "41 31 0:38 / /a\\040b rw,relatime shared:9 master:1 - cgroup2 none rw";
        assert_eq!(version_2(line), Some("/a b".into()));
        assert_eq!(version_2("32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu"), None);
    }

    #[test]
    fn a_group_is_added_to_one_that_is_there_and_brings_back_none_that_is_gone() {
        let node = tempfile::tempdir().unwrap();
        let pod = node.path().join("pod");
        add(&pod).unwrap();
        add(&pod).unwrap();
        assert!(pod.is_dir());
        fs::remove_dir_all(node.path()).unwrap();
        let error = add(&pod).unwrap_err().to_string();
        assert!(error.contains("is its lab up?") && !node.path().exists(), "{error}");
    }

    #[test]
    fn groups_are_listed_from_the_top() {
        let root = std::env::temp_dir().join(format!("cirri-lab-cgroup-{}", std::process::id()));
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::create_dir_all(root.join("c")).unwrap();
        let all = tree(&root);
        assert_eq!((all.len(), &all[0]), (4, &root));
        remove(&root).unwrap();
        assert!(!root.exists());
        remove(&root).unwrap();
    }
}
