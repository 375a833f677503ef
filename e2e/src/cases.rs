//! NetworkPolicy cases as files: `cases/networkpolicy/NN-name/`.
//!
//! - `about.txt`: one sentence, what the case shows.
//! - `policies.yaml`: the policies, and pods or namespaces beyond the common `base.yaml`. A document
//!   with the kind and name of one in the base replaces it. Addresses are written as `{{ip4:x/a}}`,
//!   `{{ip6:node1}}` or, as the network of some length that holds them, `{{cidr4:x/a/24}}`; names
//!   are those of pods, of nodes, and `world` for the address outside the cluster.
//! - `says.txt`: what must come out, derived by hand from the specification ([`says`]).
//! - `expected.txt`: the same as a [`Matrix`], written by the reference evaluator. A test holds both
//!   against each other.

mod matrix;
mod says;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;

use crate::reference::{Connection, ManifestError, World};

pub use matrix::{Cell, Family, Matrix, PROBES, Probe};

/// Name of the address outside the cluster.
pub const OUTSIDE: &str = "world";

/// Why a case cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CaseError {
    /// A file is missing or unreadable.
    #[error("{path}: {source}")]
    File {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A placeholder names nobody, or no network.
    #[error("placeholder {{{{{0}}}}} names no address here; write e.g. {{{{ip4:x/a}}}} or {{{{cidr6:node1/112}}}}")]
    Placeholder(String),
    /// A manifest that the API server would refuse.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A matrix or a statement that cannot be read.
    #[error("{file}, line {line}: {problem}")]
    Text {
        /// Which of the case's files.
        file: &'static str,
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        problem: String,
    },
}

/// One case, read from its folder.
#[derive(Debug, Clone)]
pub struct Case {
    /// Name of the folder.
    pub name: String,
    /// What it shows.
    pub about: String,
    /// Its folder.
    pub folder: PathBuf,
    base: String,
    policies: String,
}

/// The addresses of every pod (`namespace/name`), node (`name`) and [`OUTSIDE`].
#[derive(Debug, Clone, Default)]
pub struct Addresses(pub BTreeMap<String, Vec<IpAddr>>);

/// All cases, in the order of their numbers.
///
/// # Errors
/// If a file cannot be read.
pub fn all() -> Result<Vec<Case>, CaseError> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("cases/networkpolicy");
    let base = read(&root.join("base.yaml"))?;
    let entries = std::fs::read_dir(&root).map_err(|source| CaseError::File { path: root.clone(), source })?;
    let mut folders: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    folders.sort();
    folders
        .into_iter()
        .map(|folder| {
            Ok(Case {
                name: folder.file_name().unwrap_or_default().to_string_lossy().into_owned(),
                about: read(&folder.join("about.txt"))?.trim().to_string(),
                policies: read(&folder.join("policies.yaml"))?,
                base: base.clone(),
                folder,
            })
        })
        .collect()
}

fn read(path: &Path) -> Result<String, CaseError> {
    std::fs::read_to_string(path).map_err(|source| CaseError::File { path: path.to_path_buf(), source })
}

impl Case {
    /// The pods, namespaces and nodes of the case, without its policies: what must be there before
    /// the placeholders can be filled in.
    pub fn surroundings(&self) -> String {
        let mut documents: BTreeMap<String, &str> = BTreeMap::new();
        for document in split(&self.base).chain(split(&self.policies).filter(|text| !is_policy(text))) {
            documents.insert(title(document), document);
        }
        documents.into_values().collect::<Vec<_>>().join("\n---\n")
    }

    /// The policies, with the placeholders filled in.
    ///
    /// # Errors
    /// If a placeholder names no address.
    pub fn policies(&self, addresses: &Addresses) -> Result<String, CaseError> {
        let text = split(&self.policies).filter(|text| is_policy(text)).collect::<Vec<_>>().join("\n---\n");
        addresses.fill_in(&text)
    }

    /// The whole case as the reference evaluator sees it.
    ///
    /// # Errors
    /// If a manifest or a placeholder is wrong.
    pub fn world(&self, addresses: &Addresses) -> Result<World, CaseError> {
        let mut world = World::read(&format!("{}\n---\n{}", self.surroundings(), self.policies(addresses)?))?;
        for (name, list) in &addresses.0 {
            for address in list {
                world.give_address(name, *address);
            }
        }
        Ok(world)
    }

    /// What the reference evaluator expects where these are the addresses.
    ///
    /// # Errors
    /// As [`Case::world`].
    pub fn evaluate(&self, addresses: &Addresses) -> Result<Matrix, CaseError> {
        let world = self.world(addresses)?;
        Ok(Matrix::fill(&participants(&world), |cell| {
            let connection = Connection {
                from: addresses.get(&cell.from, cell.family)?,
                to: addresses.get(&cell.to, cell.family)?,
                protocol: cell.probe.protocol,
                port: cell.probe.port,
            };
            Some(world.allowed(&connection))
        }))
    }

    /// What the case's author derived by hand.
    ///
    /// # Errors
    /// If a statement cannot be read.
    pub fn says(&self) -> Result<Matrix, CaseError> {
        let world = World::read(&self.surroundings())?;
        says::matrix(&read(&self.folder.join("says.txt"))?, &world)
    }

    /// The matrix as it stands in the case's folder.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn expected(&self) -> Result<Matrix, CaseError> {
        Matrix::parse(&read(&self.folder.join("expected.txt"))?)
    }
}

impl Addresses {
    /// Made-up addresses for every pod and node of the case, for tests without a network.
    ///
    /// # Errors
    /// If a manifest is wrong.
    pub fn invented(case: &Case) -> Result<Addresses, CaseError> {
        let world = World::read(&case.surroundings())?;
        let mut addresses = BTreeMap::new();
        addresses.insert(OUTSIDE.to_string(), parse_all(["203.0.113.77", "2001:db8:77::77"]));
        for (index, node) in world.nodes.iter().enumerate() {
            let number = index + 1;
            let own = [format!("192.168.50.{number}"), format!("fd00:50::{number:x}")];
            addresses.insert(node.name.clone(), parse_all(own.iter().map(String::as_str)));
            for (index, pod) in world.pods.iter().filter(|pod| pod.node == node.name).enumerate() {
                let host = index + 5;
                let own = [format!("10.244.{number}.{host}"), format!("fd00:10:244:{number:x}::{host:x}")];
                addresses.insert(pod.full_name(), parse_all(own.iter().map(String::as_str)));
            }
        }
        Ok(Addresses(addresses))
    }

    /// The address of `name` in one family.
    pub fn get(&self, name: &str, family: Family) -> Option<IpAddr> {
        self.0.get(name)?.iter().copied().find(|address| address.is_ipv4() == (family == Family::V4))
    }

    /// The text with its placeholders filled in.
    ///
    /// # Errors
    /// If one names nobody.
    pub fn fill_in(&self, text: &str) -> Result<String, CaseError> {
        let mut filled = String::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once("{{") {
            let (placeholder, after) =
                after.split_once("}}").ok_or_else(|| CaseError::Placeholder(after.chars().take(20).collect()))?;
            let value = self.resolve(placeholder).ok_or_else(|| CaseError::Placeholder(placeholder.to_string()))?;
            filled.push_str(before);
            filled.push_str(&value);
            rest = after;
        }
        filled.push_str(rest);
        Ok(filled)
    }

    fn resolve(&self, placeholder: &str) -> Option<String> {
        let (what, name) = placeholder.split_once(':')?;
        match what {
            "ip4" => Some(self.get(name, Family::V4)?.to_string()),
            "ip6" => Some(self.get(name, Family::V6)?.to_string()),
            "cidr4" | "cidr6" => {
                let (name, length) = name.rsplit_once('/')?;
                let family = if what == "cidr4" { Family::V4 } else { Family::V6 };
                Some(IpNet::new(self.get(name, family)?, length.parse().ok()?).ok()?.trunc().to_string())
            }
            _ => None,
        }
    }
}

/// Every pod, the outside, and every node, in the order that the matrix shows them.
fn participants(world: &World) -> Vec<String> {
    let mut names: Vec<String> = world.pods.iter().map(|pod| pod.full_name()).collect();
    names.sort();
    names.push(OUTSIDE.to_string());
    names.extend(world.nodes.iter().map(|node| node.name.clone()));
    names
}

fn parse_all<'a>(texts: impl IntoIterator<Item = &'a str>) -> Vec<IpAddr> {
    texts.into_iter().filter_map(|text| text.parse().ok()).collect()
}

/// The documents of a YAML stream whose separators stand on lines of their own.
fn split(yaml: &str) -> impl Iterator<Item = &str> {
    yaml.split("---\n").map(str::trim).filter(|document| document.lines().any(|line| !line.starts_with('#')))
}

fn is_policy(document: &str) -> bool {
    document.lines().any(|line| line == "kind: NetworkPolicy")
}

/// Kind, namespace and name as the document writes them: equal for two documents about one object.
fn title(document: &str) -> String {
    let line = |start: &str| document.lines().find(|line| line.trim_start().starts_with(start)).unwrap_or_default();
    let kind = line("kind:");
    let namespace = if kind.ends_with("Pod") { line("namespace:").trim() } else { "" };
    format!("{kind} {namespace} {}", line("name:").trim())
}

#[cfg(test)]
mod tests {
    use super::{Addresses, Case, Matrix};

    fn cases() -> Vec<(Case, Matrix)> {
        let cases = super::all().unwrap();
        cases
            .into_iter()
            .map(|case| {
                let addresses = Addresses::invented(&case).unwrap_or_else(|error| panic!("{}: {error}", case.name));
                let matrix = case.evaluate(&addresses).unwrap_or_else(|error| panic!("{}: {error}", case.name));
                (case, matrix)
            })
            .collect()
    }

    #[test]
    fn there_are_at_least_sixty_four_cases_and_each_says_what_it_shows() {
        let cases = cases();
        assert!(cases.len() >= 64, "only {} cases", cases.len());
        for (case, matrix) in &cases {
            assert!(case.about.ends_with('.') && !case.about.contains('\n'), "{}: {:?}", case.name, case.about);
            assert!(matrix.len() >= 4 * 2 * 9 * 12, "{}: {} cells", case.name, matrix.len());
        }
    }

    #[test]
    fn the_reference_evaluator_comes_to_what_was_derived_by_hand() {
        let mut wrong = String::new();
        for (case, matrix) in cases() {
            let says = case.says().unwrap_or_else(|error| panic!("{}: {error}", case.name));
            for difference in matrix.differences(&says) {
                wrong.push_str(&format!("{} ({}): evaluator {difference} says.txt\n", case.name, case.about));
            }
        }
        assert!(wrong.is_empty(), "{wrong}");
    }

    /// Set `CIRRI_WRITE_EXPECTED=1` to write the files anew after a case changed.
    #[test]
    fn expected_matrices_are_those_of_the_reference_evaluator() {
        for (case, matrix) in cases() {
            if std::env::var_os("CIRRI_WRITE_EXPECTED").is_some() {
                std::fs::write(case.folder.join("expected.txt"), matrix.to_string()).unwrap();
            }
            let expected = case.expected().unwrap_or_else(|error| panic!("{}: {error}", case.name));
            let differences: Vec<String> = matrix.differences(&expected).map(|d| d.to_string()).collect();
            assert!(differences.is_empty(), "{}: {differences:#?}", case.name);
        }
    }

    #[test]
    fn a_matrix_survives_being_written_and_read() {
        for (case, matrix) in cases() {
            assert_eq!(Matrix::parse(&matrix.to_string()).unwrap(), matrix, "{}", case.name);
        }
    }

    #[test]
    fn a_case_does_not_hang_on_the_addresses_that_pods_happen_to_get() {
        for (case, matrix) in cases() {
            let mut addresses = Addresses::invented(&case).unwrap();
            for list in addresses.0.values_mut() {
                *list = list.iter().map(|address| shifted(*address)).collect();
            }
            let moved = case.evaluate(&addresses).unwrap();
            assert_eq!(moved, matrix, "{}", case.name);
        }
    }

    /// Another host number in the same pod network; nodes and the outside stay.
    fn shifted(address: std::net::IpAddr) -> std::net::IpAddr {
        match address {
            std::net::IpAddr::V4(v4) if v4.octets()[0] == 10 => {
                let [a, b, c, d] = v4.octets();
                [a, b, c, 211 - d.wrapping_mul(7)].into()
            }
            std::net::IpAddr::V6(v6) if v6.segments()[1] == 0x10 => {
                let mut segments = v6.segments();
                segments[7] = 9001 - segments[7] * 7;
                segments.into()
            }
            other => other,
        }
    }
}
