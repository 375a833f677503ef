//! The logs of a lab that is gone: what an error points to must be there to be read.

use std::fs;
use std::io;
use std::path::Path;

/// Where a pod's programs write files of their own; what they call a log is none of the lab's.
pub const WORK: &str = "work";

/// Removes everything below a directory but logs.
///
/// # Errors
/// What the file system refused.
pub fn keep(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let path = entry.path();
        if !entry.file_type()?.is_dir() {
            if !is_log(&path) {
                fs::remove_file(&path)?;
            }
        } else if entry.file_name() == WORK {
            fs::remove_dir_all(&path)?;
        } else {
            keep(&path)?;
        }
    }
    if fs::read_dir(directory)?.next().is_none() {
        fs::remove_dir(directory)?;
    }
    Ok(())
}

/// Whether there is nothing but logs below a directory: what [`keep`] leaves.
pub fn alone(directory: &Path) -> bool {
    let Ok(mut entries) = fs::read_dir(directory) else { return false };
    let mut any = false;
    entries.all(|entry| {
        any = true;
        let Ok(entry) = entry else { return false };
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) { alone(&path) } else { is_log(&path) }
    }) && any
}

fn is_log(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "log")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_stay_where_they_are_and_nothing_else_does() {
        let lab = tempfile::tempdir().unwrap();
        for directory in ["nodes/a/state", "pods/p/work", "etcd/member"] {
            fs::create_dir_all(lab.path().join(directory)).unwrap();
        }
        let files = [
            "lab.json",
            "nodes/a/agent.log",
            "nodes/a/state/x.redb",
            "pods/p/work/own.log",
            "etcd/member/db",
            "etcd.log",
        ];
        for file in files {
            fs::write(lab.path().join(file), "x").unwrap();
        }
        assert!(!alone(lab.path()));
        keep(lab.path()).unwrap();
        assert!(alone(lab.path()));
        for file in files {
            let stays = ["nodes/a/agent.log", "etcd.log"].contains(&file);
            assert_eq!(lab.path().join(file).exists(), stays, "{file}");
        }
        assert!(!lab.path().join("pods").exists() && !lab.path().join("etcd").exists());
    }

    #[test]
    fn an_empty_directory_is_no_kept_log() {
        let lab = tempfile::tempdir().unwrap();
        assert!(!alone(lab.path()));
        keep(lab.path()).unwrap();
        assert!(!lab.path().exists());
    }
}
