//! Reading the configuration, with the source of every value.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cirri_control::cut::cut_message;
use cirri_control::resource::{past_limit, yaml_options};
use cirri_control::service::maglev;
use serde_json::Value;

use super::{Config, Dispatch, Forwarding, RoutingMode, StoreKind};
use crate::api::ConfigValue;

/// A configuration and where its values came from.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// What holds.
    pub config: Config,
    /// Every value and its source, by key.
    pub values: Vec<ConfigValue>,
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what it should be; the text begins with `FILE:LINE:COLUMN`.
    #[error("{0}")]
    File(String),
    /// A value from elsewhere does not fit.
    #[error("{source_name}: {why}")]
    Value {
        /// The variable or option.
        source_name: String,
        /// What is wrong with it.
        why: String,
    },
    /// Values that do not go together.
    #[error("{0}")]
    Contradiction(String),
}

/// Reads defaults, then the file, then variables of the environment, then `KEY=VALUE` of the
/// command line.
///
/// # Errors
/// The first thing that is wrong, with the file and line or the name it stands under.
pub fn load(
    file: Option<&Path>,
    env: impl Fn(&str) -> Option<String>,
    flags: &[String],
) -> Result<Loaded, ConfigError> {
    let mut tree = to_tree(&Config::default());
    let mut values = BTreeMap::new();
    leaves(&tree, String::new(), &mut |key, value| {
        values.insert(key, ConfigValue { key: String::new(), value: value.clone(), source: "default".to_owned() });
    });

    if let Some(path) = file {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        for (key, value) in read_file(path, &text)? {
            put(&mut tree, &key, value);
            if let Some(known) = values.get_mut(&key) {
                known.source = format!("file {}", path.display());
            }
        }
    }
    for (key, known) in &mut values {
        let name = env_name(key);
        if let Some(text) = env(&name) {
            set(&mut tree, key, &text).map_err(|why| ConfigError::Value { source_name: name.clone(), why })?;
            known.source = format!("env {name}");
        }
    }
    for flag in flags {
        let refuse = |why: String| ConfigError::Value { source_name: format!("--set {flag}"), why };
        let (key, text) = flag.split_once('=').ok_or_else(|| refuse("write KEY=VALUE".to_owned()))?;
        let known = values
            .get_mut(key)
            .ok_or_else(|| refuse(format!("there is no `{key}`; `cirri config` lists every key")))?;
        set(&mut tree, key, text).map_err(refuse)?;
        known.source = "flag".to_owned();
    }

    let config: Config =
        serde_json::from_value(tree.clone()).map_err(|error| ConfigError::Contradiction(error.to_string()))?;
    check(&config)?;
    leaves(&tree, String::new(), &mut |key, value| {
        if let Some(known) = values.get_mut(&key) {
            known.value = value.clone();
        }
    });
    let values = values.into_iter().map(|(key, value)| ConfigValue { key, ..value }).collect();
    Ok(Loaded { config, values })
}

/// The keys that a file sets, with their values as the types understand them.
fn read_file(path: &Path, text: &str) -> Result<Vec<(String, Value)>, ConfigError> {
    if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
        return Ok(Vec::new());
    }
    let wrong = |error: serde_saphyr::Error| ConfigError::File(describe(path, text, &error));
    let typed: Config = serde_saphyr::from_str_with_options(text, yaml_options(text)).map_err(wrong)?;
    let raw: Value = serde_saphyr::from_str_with_options(text, yaml_options(text)).map_err(wrong)?;
    let understood = to_tree(&typed);
    let mut set = Vec::new();
    leaves(&understood, String::new(), &mut |key, value| {
        if get(&raw, &key).is_some() {
            set.push((key, value.clone()));
        }
    });
    Ok(set)
}

fn describe(path: &Path, text: &str, error: &serde_saphyr::Error) -> String {
    let said = past_limit(text, error).unwrap_or_else(|| error.without_snippet().to_string());
    let what = cut_message(said.lines().next().unwrap_or_default());
    match error.location() {
        Some(location) => format!("{}:{}:{}: {what}", path.display(), location.line(), location.column()),
        None => format!("{}: {what}", path.display()),
    }
}

/// Sets one leaf from text. Lists are separated by commas.
fn set(tree: &mut Value, key: &str, text: &str) -> Result<(), String> {
    let attempts = [
        Value::String(text.to_owned()),
        serde_json::from_str(text).unwrap_or(Value::Null),
        Value::Array(text.split(',').filter(|part| !part.is_empty()).map(|part| part.into()).collect()),
    ];
    let mut first_error = None;
    for value in attempts {
        let mut trial = tree.clone();
        put(&mut trial, key, value);
        match serde_json::from_value::<Config>(trial) {
            Ok(config) => {
                *tree = to_tree(&config);
                return Ok(());
            }
            Err(error) => first_error = first_error.or(Some(error.to_string())),
        }
    }
    Err(format!("`{text}` does not fit `{key}`: {}", first_error.unwrap_or_default()))
}

/// What types cannot say.
fn check(config: &Config) -> Result<(), ConfigError> {
    let refuse = |text: String| Err(ConfigError::Contradiction(text));
    let cluster = &config.cluster;
    if !(cluster.pod_cidr_v4.prefix_len()..=30).contains(&cluster.pod_cidr_v4_per_node) {
        return refuse(format!(
            "cluster.podCidrV4PerNode is {} but must lie between the pool's /{} and /30",
            cluster.pod_cidr_v4_per_node,
            cluster.pod_cidr_v4.prefix_len()
        ));
    }
    if !(cluster.pod_cidr_v6.prefix_len()..=126).contains(&cluster.pod_cidr_v6_per_node) {
        return refuse(format!(
            "cluster.podCidrV6PerNode is {} but must lie between the pool's /{} and /126",
            cluster.pod_cidr_v6_per_node,
            cluster.pod_cidr_v6.prefix_len()
        ));
    }
    if !(1..=25).contains(&config.pods.patience_seconds) {
        return refuse(format!("pods.patienceSeconds is {}; take 1 to 25", config.pods.patience_seconds));
    }
    if cluster.identity_grace_seconds > 300 {
        return refuse(format!("cluster.identityGraceSeconds is {}; take 0 to 300", cluster.identity_grace_seconds));
    }
    if config.store.kind == StoreKind::Folder && config.store.folder.as_os_str().is_empty() {
        return refuse(
            "store.kind is folder but store.folder is empty; name the directory that holds the manifests".to_owned(),
        );
    }
    if !(5..=86_400).contains(&config.store.etcd.lease_seconds) {
        return refuse(format!("store.etcd.leaseSeconds is {}; take 5 to 86400", config.store.etcd.lease_seconds));
    }
    if config.store.kind == StoreKind::Etcd && config.store.etcd.endpoints.is_empty() {
        return refuse("store.kind is etcd but store.etcd.endpoints is empty; name its members".to_owned());
    }
    check_services(config)?;
    let instance = &config.bpf.instance;
    let simple = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if instance.is_empty() || instance.len() > 64 || !instance.chars().all(simple) {
        return refuse(format!("bpf.instance is `{instance}`; use up to 64 letters, digits, `-` and `_`"));
    }
    Ok(())
}

fn check_services(config: &Config) -> Result<(), ConfigError> {
    let refuse = |text: String| Err(ConfigError::Contradiction(text));
    let (services, masquerade) = (&config.services, &config.masquerade);
    let (ports, taken) = (services.node_ports, masquerade.ports);
    if ports.first <= taken.last && taken.first <= ports.last {
        return refuse(format!(
            "services.nodePorts {} and masquerade.ports {} overlap; a port can be one or the other",
            String::from(ports),
            String::from(taken)
        ));
    }
    if services.maglev_size != 0 && !maglev::SIZES.contains(&services.maglev_size) {
        let sizes: Vec<String> = maglev::SIZES.iter().map(u32::to_string).collect();
        return refuse(format!(
            "services.maglevSize is {}; take 0 (by the number of backends) or one of {}",
            services.maglev_size,
            sizes.join(", ")
        ));
    }
    let returns_directly = services.forwarding != Forwarding::Snat;
    if returns_directly && services.dispatch == Dispatch::Ipip && config.routing.mode != RoutingMode::Direct {
        return refuse(
            "services.dispatch ipip needs routing.mode direct; take dispatch option with the overlay".to_owned(),
        );
    }
    Ok(())
}

/// `routing.mode` as `CIRRI_ROUTING_MODE`.
fn env_name(key: &str) -> String {
    let mut name = String::from("CIRRI_");
    for c in key.chars() {
        if c == '.' {
            name.push('_');
        } else {
            if c.is_ascii_uppercase() {
                name.push('_');
            }
            name.push(c.to_ascii_uppercase());
        }
    }
    name
}

fn to_tree(config: &Config) -> Value {
    serde_json::to_value(config).unwrap_or_default()
}

fn leaves(tree: &Value, prefix: String, each: &mut impl FnMut(String, &Value)) {
    match tree {
        Value::Object(fields) => {
            for (name, value) in fields {
                let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
                leaves(value, key, each);
            }
        }
        leaf => each(prefix, leaf),
    }
}

fn get<'a>(tree: &'a Value, key: &str) -> Option<&'a Value> {
    key.split('.').try_fold(tree, |tree, name| tree.get(name))
}

fn put(tree: &mut Value, key: &str, value: Value) {
    let mut at = tree;
    for name in key.split('.') {
        at = &mut at[name];
    }
    *at = value;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load_text(text: &str, env: &[(&str, &str)], flags: &[&str]) -> Result<Loaded, ConfigError> {
        let dir =
            std::env::temp_dir().join(format!("cirri-config-{}-{:?}", std::process::id(), std::thread::current().id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("agent.yaml");
        std::fs::write(&path, text).unwrap();
        let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
        let env = |name: &str| env.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        let loaded = load(Some(&path), env, &flags);
        std::fs::remove_dir_all(&dir).unwrap();
        loaded
    }

    fn source(loaded: &Loaded, key: &str) -> String {
        loaded.values.iter().find(|value| value.key == key).map(|value| value.source.clone()).unwrap()
    }

    const FOLDER: &str = "store:\n  folder: /etc/cirri/manifests\n";

    #[test]
    fn every_value_says_where_it_came_from_and_the_stronger_source_wins() {
        let text = format!("{FOLDER}routing: {{mode: direct}}\nnode: {{name: a, ipv4: 10.0.0.1}}\n");
        let env = [
            ("CIRRI_NODE_NAME", "b"),
            ("CIRRI_CLUSTER_POD_CIDR_V4", "10.9.0.0/16"),
            ("CIRRI_NODE_DEVICES", "eth0,eth1"),
        ];
        let loaded = load_text(&text, &env, &["node.name=c", "masquerade.ipv6=false"]).unwrap();
        assert_eq!(loaded.config.node.name, "c");
        assert_eq!(loaded.config.node.devices, ["eth0", "eth1"]);
        assert_eq!(loaded.config.routing.mode, RoutingMode::Direct);
        assert!(!loaded.config.masquerade.ipv6);
        assert_eq!(source(&loaded, "node.name"), "flag");
        assert!(source(&loaded, "routing.mode").starts_with("file "));
        assert_eq!(source(&loaded, "cluster.podCidrV4"), "env CIRRI_CLUSTER_POD_CIDR_V4");
        assert_eq!(source(&loaded, "node.ipv6"), "default");
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_line() {
        let error = load_text(&format!("{FOLDER}routing:\n  mod: direct\n"), &[], &[]).unwrap_err().to_string();
        assert!(error.contains("agent.yaml:4:") && error.contains("mod"), "{error}");
        let error = load_text(FOLDER, &[], &["routing.mod=direct"]).unwrap_err().to_string();
        assert!(error.contains("routing.mod"), "{error}");
    }

    #[test]
    fn a_wrong_value_says_what_would_be_right() {
        for (text, want) in [
            ("masquerade: {ports: 1000-2000}", "power of two"),
            ("cluster: {podCidrV4PerNode: 8}", "/16 and /30"),
            ("bpf: {instance: ../x}", "letters, digits"),
            ("routing: {mode: magic}", "overlay"),
            ("services: {nodePorts: 40000-50000}", "masquerade.ports 49152-65535 overlap"),
            ("services: {nodePorts: 32767-30000}", "FIRST-LAST"),
            ("services: {forwarding: dsr, dispatch: ipip}", "routing.mode direct"),
            ("services: {maglevSize: 1000}", "16381"),
            ("services: {acceleration: fast}", "best-effort"),
            ("services: {socket: {mode: some}}", "host"),
        ] {
            let error = load_text(&format!("{FOLDER}{text}\n"), &[], &[]).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
        let error = load_text("store: {folder: ''}", &[], &[]).unwrap_err().to_string();
        assert!(error.contains("store.folder"), "{error}");
    }

    #[test]
    fn what_aliases_stand_for_is_bounded_by_the_size_of_the_file() {
        let name = "x".repeat(10_000);
        let text = format!("{FOLDER}node:\n  name: &a {name}\n  devices: [{}]\n", vec!["*a"; 3_000].join(","));
        let error = load_text(&text, &[], &[]).map(drop).unwrap_err().to_string();
        let limit = format!("bytes of text with its aliases, the limit for a document of {} bytes", text.len());
        assert!(error.contains("agent.yaml:5:") && error.ends_with(&limit), "{error}");
    }

    #[test]
    fn the_defaults_print_and_read_back() {
        let text = serde_saphyr::to_string(&Config::default()).unwrap();
        assert_eq!(serde_saphyr::from_str::<Config>(&text).unwrap(), Config::default());
    }
}
