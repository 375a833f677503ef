//! Reading manifests: everything is checked before anything is changed.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use cirri_control::resource::{Resource, ResourceError, read_documents};
use cirri_loader::is_being_written;
use cirri_store::folder::{read_bounded, read_file};

use super::state::Lab;
use crate::output;

/// Manifests that were refused. Nothing was changed.
#[derive(Debug, thiserror::Error)]
#[error("{}\nnothing was changed", .0.join("\ncirri: "))]
pub struct Rejected(pub Vec<String>);

/// Reads all files, or all `.yaml`, `.yml` and `.json` files of a directory, in the order of their names.
///
/// # Errors
/// [`Rejected`] with every document that cannot be used, and every resource that is there twice. Kinds that other
/// programs read are passed over, and named.
pub fn read(paths: &[PathBuf]) -> Result<Vec<Resource>, Rejected> {
    let mut problems = Vec::new();
    let mut resources = Vec::new();
    let mut seen: BTreeMap<String, String> = BTreeMap::new();
    for file in files(paths, &mut problems) {
        let name = file.path.display().to_string();
        let documents = match content(&file) {
            Ok(bytes) => read_documents(&name, &bytes),
            Err(why) => {
                problems.push(format!("{name}: cannot be read: {why}"));
                continue;
            }
        };
        for resource in documents.resources {
            if let Some(first) = seen.insert(resource.store_key(), name.clone()) {
                let what = describe(&resource);
                problems.push(format!("{name}: {what} is already in {first}: keep one of them"));
            }
            resources.push(resource);
        }
        for error in documents.errors {
            match error {
                // It is none of ours and takes nothing of ours with it.
                ResourceError::Kind { .. } => output::complain(&error.to_string()),
                error => problems.push(error.to_string()),
            }
        }
        if documents.more_errors > 0 {
            problems.push(format!("{name}: {} more errors are not shown", documents.more_errors));
        }
    }
    if problems.is_empty() { Ok(resources) } else { Err(Rejected(problems)) }
}

/// Checks what only the lab can know: that nodes exist, and that containers have something to run.
///
/// # Errors
/// [`Rejected`] with everything that does not fit.
pub fn check(resources: &[Resource], lab: &Lab) -> Result<(), Rejected> {
    let nodes: Vec<&str> = lab.nodes.iter().map(|node| node.name.as_str()).collect();
    let has = format!("the lab \"{}\" has {}", lab.name, nodes.join(", "));
    let mut problems = Vec::new();
    for resource in resources {
        match resource {
            Resource::Node(_) if !nodes.contains(&resource.name()) => problems.push(format!(
                "{}: no such node: {has}; nodes are made by `cirri lab up -f`, from the same manifests",
                describe(resource)
            )),
            Resource::Pod(pod) => {
                let wanted = pod.spec.node_name.as_deref();
                if let Some(node) = wanted.filter(|node| !nodes.contains(node)) {
                    problems.push(format!("{}: spec.nodeName: no node {node}: {has}", describe(resource)));
                }
                for container in pod.spec.running().filter(|c| c.command.is_empty() && !c.args.is_empty()) {
                    problems.push(format!(
                        "{}: container {} has args but no command: the lab runs no images, name the program in command",
                        describe(resource),
                        container.name
                    ));
                }
            }
            _ => {}
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(Rejected(problems)) }
}

/// The names of the nodes that the manifests declare, in order.
pub fn node_names(resources: &[Resource]) -> Vec<String> {
    resources.iter().filter(|r| matches!(r, Resource::Node(_))).map(|r| r.name().to_owned()).collect()
}

/// The file that declares a node.
pub fn file_of_node(paths: &[PathBuf], node: &str) -> Option<PathBuf> {
    let declares = |source: &Source| {
        let documents = content(source).map(|bytes| read_documents("", &bytes));
        documents.is_ok_and(|documents| node_names(&documents.resources).iter().any(|name| name == node))
    };
    files(paths, &mut Vec::new()).into_iter().find(declares).map(|source| source.path)
}

/// A resource as `pod shop/web`.
pub fn describe(resource: &Resource) -> String {
    describe_key(&resource.store_key())
}

/// The resource of a store key as `pod shop/web`.
pub fn describe_key(key: &str) -> String {
    let mut parts = key.trim_start_matches("resources/").splitn(3, '/');
    let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
    match (parts.next().unwrap_or_default(), parts.next().unwrap_or_default()) {
        ("_", name) => format!("{kind} {name}"),
        (namespace, name) => format!("{kind} {namespace}/{name}"),
    }
}

/// What is to be read. Whatever a directory calls a manifest belongs to it, also what cannot be read: what it holds would
/// otherwise be removed, and who loses his policies is open.
fn files(paths: &[PathBuf], problems: &mut Vec<String>) -> Vec<Source> {
    let mut all = Vec::new();
    for path in paths {
        let name = path.display();
        match fs::metadata(path) {
            Err(error) => problems.push(format!("{name}: cannot be read: {}", explain(path, &error))),
            // Who names one file means it as it is now, open or not; and a pipe is as good as a file: `-f <(…)`.
            Ok(meta) if !meta.is_dir() => all.push(Source { path: path.clone(), stream: true }),
            Ok(_) => match fs::read_dir(path).and_then(Iterator::collect::<Result<Vec<_>, _>>) {
                Err(error) => problems.push(format!("{name}: cannot be read: {error}")),
                Ok(entries) => {
                    let mut found: Vec<PathBuf> =
                        entries.into_iter().map(|e| e.path()).filter(|p| is_manifest(p)).collect();
                    found.sort();
                    all.extend(found.into_iter().map(|path| Source { path, stream: false }));
                }
            },
        }
    }
    all
}

/// Where manifests are read from.
struct Source {
    path: PathBuf,
    /// It is read as it comes, whatever it is.
    stream: bool,
}

/// Whether a directory's entry is a manifest, by its name alone: what stands behind it may be gone for a moment.
fn is_manifest(path: &Path) -> bool {
    let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
    let known = path.extension().is_some_and(|extension| matches!(extension.to_str(), Some("yaml" | "yml" | "json")));
    known && !hidden
}

/// What stands there, whole; or why that cannot be known.
fn content(source: &Source) -> Result<Vec<u8>, String> {
    let Source { path, stream } = source;
    let read = match stream {
        true => fs::File::open(path).and_then(read_bounded).map(Some),
        false => read_file(path, is_being_written),
    };
    match read {
        Ok(Some(bytes)) => Ok(bytes),
        Ok(None) => Err("somebody is writing it: apply again when it is complete".to_owned()),
        Err(error) => Err(explain(path, &error)),
    }
}

fn explain(path: &Path, error: &io::Error) -> String {
    if path.is_dir() {
        return "it is a directory".to_owned();
    }
    match error.kind() {
        io::ErrorKind::NotFound if path.is_symlink() => {
            "it is a link to nothing: mend the link, or remove it".to_owned()
        }
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: c}]}\n";

    #[test]
    fn every_problem_is_named_and_one_is_enough_to_refuse_all() {
        let directory = std::env::temp_dir().join(format!("cirri-lab-manifests-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        for (name, text) in [("a.yaml", POD), ("b.yml", POD), ("c.json", "{"), ("notes.txt", "{"), (".d.yaml", "{")] {
            fs::write(directory.join(name), text).unwrap();
        }
        let Rejected(problems) = read(std::slice::from_ref(&directory)).unwrap_err();
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].contains("b.yml: pod default/a is already in"), "{problems:?}");
        assert!(problems[1].contains("c.json"), "{problems:?}");
        assert_eq!(read(&[directory.join("a.yaml")]).unwrap().len(), 1);
        assert!(read(&[directory.join("missing")]).is_err());
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn what_a_directory_names_and_does_not_give_is_refused_and_never_taken_for_gone() {
        use std::os::unix::fs::symlink;

        type Make = fn(&Path) -> io::Result<()>;
        let kinds: [(Make, &str); 6] = [
            (|path| symlink("/nowhere/p.yaml", path), "link to nothing"),
            // As a volume has it whose `..data` is gone.
            (|path| symlink("..data/p.yaml", path), "link to nothing"),
            (|path| symlink(path, path), "symbolic link"),
            (|path| symlink("a.yaml/p.yaml", path), "ot a directory"),
            (|path| fs::create_dir(path), "it is a directory"),
            (|path| std::os::unix::net::UnixListener::bind(path).map(drop), "no regular file"),
        ];
        for (make, why) in kinds {
            let directory = tempfile::tempdir().unwrap();
            fs::write(directory.path().join("a.yaml"), POD).unwrap();
            make(&directory.path().join("p.yaml")).unwrap();
            let Err(Rejected(problems)) = read(&[directory.path().to_owned()]) else { panic!("{why}: it is accepted") };
            assert_eq!(problems.len(), 1, "{problems:?}");
            assert!(problems[0].contains("p.yaml: cannot be read: ") && problems[0].contains(why), "{problems:?}");
        }
    }

    #[test]
    fn a_manifest_that_somebody_writes_is_not_read_half_and_a_pipe_is_read_as_it_comes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("p.yaml");
        fs::write(&path, POD).unwrap();
        let writer = fs::File::options().append(true).open(&path).unwrap();
        let Rejected(problems) = read(&[directory.path().to_owned()]).unwrap_err();
        assert!(problems[0].contains("somebody is writing it"), "{problems:?}");
        drop(writer);
        assert_eq!(read(&[directory.path().to_owned()]).unwrap().len(), 1);
        let (reader, mut writer) = io::pipe().unwrap();
        io::Write::write_all(&mut writer, POD.as_bytes()).unwrap();
        drop(writer);
        let given = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&reader));
        assert_eq!(read(&[given.into()]).unwrap().len(), 1);
    }
}
