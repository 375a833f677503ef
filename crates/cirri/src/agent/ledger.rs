//! Where endpoints are written down, so that they outlive the agent: each in a file, in a copy of that, and in the
//! kernel, where it lasts as long as its network does.
//!
//! A running pod must not lose its network with a file: whatever can be read of the three is enough.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};

use cirri_loader::{LoadError, Records};

use super::endpoint::Endpoint;
use crate::config::Config;
use crate::files;

/// Directories of endpoints' files. Each file stands in both.
const PLACES: [&str; 2] = ["endpoints", "endpoints.copy"];

/// Where the endpoints of an agent are written down.
#[derive(Clone, Debug)]
pub struct Ledger {
    state_dir: PathBuf,
    kernel: Records,
}

/// Why an endpoint is not written down, or not forgotten.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// A file, or its copy.
    #[error("cannot write to {directory}: {error}; free the disk or change stateDir")]
    File {
        /// The state directory.
        directory: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// What the kernel keeps.
    #[error("{0}; see whether the BPF file system is there and the machine has memory")]
    Kernel(#[from] LoadError),
}

/// What is written about one endpoint.
#[derive(Debug, Default, PartialEq)]
pub struct Found {
    /// What its file and the copy of that say, as far as they can be read.
    pub said: Vec<Endpoint>,
    /// What the kernel keeps of it.
    pub kept: Option<Endpoint>,
    /// The first of them that cannot be read or is gone, and why.
    pub spoilt: Option<(PathBuf, String)>,
}

impl Ledger {
    /// That of an agent.
    pub fn of(config: &Config) -> Ledger {
        let kernel = Records::of(&config.bpf.pin_root, &config.bpf.instance);
        Ledger { state_dir: config.state_dir.0.clone(), kernel }
    }

    /// The file of an endpoint.
    pub fn file(&self, id: u16) -> PathBuf {
        path(&self.state_dir, PLACES[0], id)
    }

    /// The directories of the files.
    pub fn directories(&self) -> impl Iterator<Item = PathBuf> {
        PLACES.into_iter().map(|place| self.state_dir.join(place))
    }

    /// Where what the kernel keeps of an endpoint is pinned.
    pub fn pin(&self, id: u16) -> PathBuf {
        self.kernel.path(id)
    }

    /// Writes an endpoint down.
    ///
    /// # Errors
    /// Where it could not be written; there stands the old one.
    pub fn save(&self, endpoint: &Endpoint) -> Result<(), LedgerError> {
        let text = serde_json::to_vec_pretty(endpoint).map_err(io::Error::from).map_err(self.in_file())?;
        save_files(&self.state_dir, endpoint.id, &text).map_err(self.in_file())?;
        Ok(self.kernel.write(endpoint.id, &text)?)
    }

    /// Makes sure that an endpoint could be written down now.
    ///
    /// # Errors
    /// A directory that cannot be written to.
    pub fn is_writable(&self) -> Result<(), LedgerError> {
        PLACES.iter().try_for_each(|place| files::is_writable(&self.state_dir.join(place))).map_err(self.in_file())
    }

    /// Removes what is written about an endpoint.
    ///
    /// # Errors
    /// What would not go.
    pub fn forget(&self, endpoint: &Endpoint) -> Result<(), LedgerError> {
        self.kernel.remove(endpoint.id)?;
        forget_files(&self.state_dir, endpoint.id).map_err(self.in_file())
    }

    /// What is written about every endpoint.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub fn load_all(&self) -> Result<Vec<Found>, LedgerError> {
        let mut all = load_files(&self.state_dir).map_err(self.in_file())?;
        for (id, text) in self.kernel.read_all()? {
            let name = OsString::from(id.to_string());
            let found = all
                .entry(name.clone())
                .or_insert_with(|| Found { spoilt: Some(gone(self.file(id))), ..Found::default() });
            match text.map_err(|error| error.to_string()).and_then(|text| parse(&name, &text)) {
                Ok(endpoint) => found.kept = Some(endpoint),
                Err(why) => found.spoilt = found.spoilt.take().or(Some((self.kernel.path(id), why))),
            }
        }
        Ok(all.into_values().collect())
    }

    fn in_file(&self) -> impl FnOnce(io::Error) -> LedgerError {
        let directory = self.state_dir.clone();
        move |error| LedgerError::File { directory, error }
    }
}

fn save_files(state_dir: &Path, id: u16, text: &[u8]) -> io::Result<()> {
    PLACES.iter().try_for_each(|place| files::write_atomic(&path(state_dir, place, id), text))
}

fn forget_files(state_dir: &Path, id: u16) -> io::Result<()> {
    PLACES.iter().try_for_each(|place| files::remove(&path(state_dir, place, id)))
}

/// What the files say, by name.
fn load_files(state_dir: &Path) -> io::Result<BTreeMap<OsString, Found>> {
    let mut all: BTreeMap<OsString, Found> = BTreeMap::new();
    for place in PLACES {
        let directory = state_dir.join(place);
        for (path, text) in files::read_each(&directory)? {
            let name = path.file_stem().unwrap_or_default().to_owned();
            let is_copy = place != PLACES[0];
            let alone = is_copy && !all.contains_key(&name);
            let found = all.entry(name.clone()).or_default();
            match text.map_err(|error| error.to_string()).and_then(|text| parse(&name, &text)) {
                Ok(endpoint) => found.said.push(endpoint),
                Err(why) => found.spoilt = found.spoilt.take().or(Some((path, why))),
            }
            if alone {
                found.spoilt = Some(gone(state_dir.join(PLACES[0]).join(&name).with_extension("json")));
            }
        }
    }
    Ok(all)
}

fn gone(file: PathBuf) -> (PathBuf, String) {
    (file, "it is gone".to_owned())
}

fn parse(name: &OsStr, text: &[u8]) -> Result<Endpoint, String> {
    let endpoint: Endpoint = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    if *name != *endpoint.id.to_string() {
        return Err(format!("it says that it is endpoint {}", endpoint.id));
    }
    Ok(endpoint)
}

fn path(state_dir: &Path, place: &str, id: u16) -> PathBuf {
    state_dir.join(place).join(format!("{id}.json"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::agent::endpoint::{HasDefault, Seen};
    use crate::api::Attachment;

    /// What the files say, in the order of their names.
    fn load(dir: &Path) -> Vec<Found> {
        load_files(dir).unwrap().into_values().collect()
    }

    fn save(dir: &Path, endpoint: &Endpoint) {
        save_files(dir, endpoint.id, &serde_json::to_vec_pretty(endpoint).unwrap()).unwrap();
    }

    #[test]
    fn every_time_that_attaching_can_take_is_read_as_it_was_written() {
        for nanoseconds in (1..2_000_000_000).step_by(999_983) {
            let ready_ms = Duration::from_nanos(nanoseconds).as_secs_f64() * 1000.0;
            let text = serde_json::to_string(&ready_ms).unwrap();
            assert_eq!(serde_json::from_str::<f64>(&text).unwrap(), ready_ms, "{text}");
        }
    }

    #[test]
    fn an_endpoint_survives_in_its_file_and_a_broken_file_harms_nobody() {
        let dir = std::env::temp_dir().join(format!("cirri-endpoints-{}", std::process::id()));
        let endpoint = Endpoint {
            id: 3,
            attachment: Attachment { network: "n".into(), container_id: "c".into(), ifname: "eth0".into() },
            netns: "/run/netns/x".into(),
            netns_cookie: 77,
            namespace: "shop".into(),
            pod: "web".into(),
            pod_uid: "u".into(),
            identity: 300,
            tunnel_identity: 299,
            labels: "k8s:app=web".into(),
            unnumbered: true,
            mac: [2, 0, 0, 0, 0, 1],
            v4: Some([10, 244, 0, 5].into()),
            v6: None,
            host_ifname: "lxc1".into(),
            ifindex: 9,
            mtu: 1450,
            has_default: HasDefault { v4: true, v6: false },
            answered: HasDefault { v4: false, v6: false },
            chain_noted: false,
            chained: Vec::new(),
            gc: true,
            ruleset: 1,
            ready_ms: 1.5,
            seen: Seen::default(),
        };
        let sound = || Found { said: vec![endpoint.clone(), endpoint.clone()], ..Found::default() };
        save(&dir, &endpoint);
        assert_eq!(load(&dir), [sound()]);

        let file = dir.join("endpoints/3.json");
        let text = std::fs::read_to_string(&file).unwrap();
        for spoilt in ["", "{", "\u{0}", &text[..text.len() / 2], &text.replace("\"id\": 3", "\"id\": 4")] {
            std::fs::write(&file, spoilt).unwrap();
            let found = load(&dir);
            assert_eq!(found[0].said, std::slice::from_ref(&endpoint), "{spoilt:?}");
            assert_eq!(found[0].spoilt.as_ref().unwrap().0, file, "{spoilt:?}");
        }
        std::fs::remove_file(&file).unwrap();
        assert_eq!(load(&dir)[0].spoilt.as_ref().unwrap().1, "it is gone");
        std::fs::create_dir(&file).unwrap();
        assert_eq!(load(&dir)[0].said, std::slice::from_ref(&endpoint), "a directory");
        // A directory does not make way for a file by itself.
        save(&dir, &endpoint);
        assert_eq!(load(&dir), [sound()]);
        files::write_atomic(&dir.join("endpoints/4.json"), b"{").unwrap();
        assert_eq!(load(&dir).len(), 2);
        std::fs::remove_file(dir.join("endpoints/4.json")).unwrap();
        forget_files(&dir, endpoint.id).unwrap();
        assert!(load(&dir).is_empty());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
