//! The cluster's state as the lab changes it: etcd for several nodes, a folder of manifests for one.
//!
//! Only `resources/` is written here, and a barrier key. Everything else in the store belongs to the agents.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use cirri_control::resource::Resource;
use cirri_store::folder::read_file;
use cirri_store::{Etcd, EtcdOptions, PREFIX, Store, StoreError};
use futures::future::ready;
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::json;

use super::interrupt::{Interrupt, Interrupted};
use super::names;
use super::netns;
use super::process;
use super::state::{Lab, Node};
use super::underlay::ROUTER_V4;
use crate::api::{EndpointInfo, PolicyInfo, Status, Wait, Waited};
use crate::client::{self, CallError};
use crate::span;

/// etcd's port for clients, in the lab's own namespace.
pub const ETCD_PORT: u16 = 2379;
const RESOURCES: &str = "resources/";
const BARRIER: &str = "barrier/lab";
/// Writes to etcd under way at once.
const WRITES: usize = 32;
/// How long one question whether everything is enforced may take.
const WAIT_SLICE: Duration = Duration::from_secs(1);
/// How long an agent may take to answer a question about what it already knows. One that is gone refuses at once: so
/// long is waited only for one that hangs.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a call to etcd may take if the lab's own is known to be gone: somebody may have started another.
const WITHOUT_ETCD: Duration = Duration::from_secs(10);

/// An agent or the store cannot be reached.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NotReachable(String);

/// What a change does to the stored resources. Keys are those of `Resource::store_key`.
#[derive(Debug, Default)]
pub struct Change {
    /// Resources to write, as JSON.
    pub put: BTreeMap<String, String>,
    /// Keys of resources to remove.
    pub delete: Vec<String>,
}

impl Change {
    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.put.is_empty() && self.delete.is_empty()
    }
}

/// The URL the lab's agents reach its etcd at.
pub fn etcd_url() -> String {
    format!("http://{ROUTER_V4}:{ETCD_PORT}")
}

/// All stored resources, by key.
///
/// # Errors
/// The store does not answer, or the folder cannot be read.
pub fn resources(lab: &Lab) -> anyhow::Result<BTreeMap<String, String>> {
    if lab.has_etcd() {
        let prefix = format!("{PREFIX}{RESOURCES}");
        let (entries, _) = in_etcd(lab, async |store| store.list(&prefix).await)?;
        let text = |value| String::from_utf8(value).context("a resource in etcd is not text");
        return entries
            .into_iter()
            .map(|entry| Ok((entry.key.trim_start_matches(PREFIX).to_owned(), text(entry.value)?)))
            .collect();
    }
    let folder = folder(lab);
    let mut found = BTreeMap::new();
    let unreadable = |path: &Path| format!("cannot read {}", path.display());
    for entry in fs::read_dir(&folder).with_context(|| unreadable(&folder))? {
        let path = entry.with_context(|| unreadable(&folder))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if !is_of_a_resource(name) {
            continue;
        }
        // Nobody else writes here; what somebody has put here all the same is waited for by nobody.
        let text = read_file(&path, |_| None).with_context(|| unreadable(&path))?.unwrap_or_default();
        let text = String::from_utf8_lossy(&text).trim_end().to_owned();
        if let Some(key) = key_of(name).or_else(|| Some(Resource::from_json(&text).ok()?.store_key())) {
            found.insert(key, text);
        }
    }
    Ok(found)
}

/// Writes and removes resources. What was written before a failure stays written: saying the same again is harmless.
///
/// # Errors
/// The store does not answer, or the folder cannot be written.
pub fn change(lab: &Lab, change: &Change) -> anyhow::Result<()> {
    if change.is_empty() {
        return Ok(());
    }
    if lab.has_etcd() {
        return in_etcd(lab, async |store| {
            // Many at once: a thousand policies would otherwise be a thousand round trips.
            let puts = change
                .put
                .iter()
                .map(|(key, json)| async move { store.put(&format!("{PREFIX}{key}"), json.as_bytes(), false).await });
            let deletes = change.delete.iter().map(|key| async move { store.delete(&format!("{PREFIX}{key}")).await });
            stream::iter(puts).buffer_unordered(WRITES).try_for_each(|_| ready(Ok(()))).await?;
            stream::iter(deletes).buffer_unordered(WRITES).try_for_each(|_| ready(Ok(()))).await
        });
    }
    let folder = folder(lab);
    for (key, json) in &change.put {
        let path = folder.join(file_of(key));
        crate::files::write_atomic(&path, format!("{json}\n").as_bytes())
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    for key in &change.delete {
        let path = folder.join(file_of(key));
        crate::files::remove(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}

/// Waits until every agent enforces everything that is in the store now, and what followed from it.
///
/// The second round makes up for what the agents themselves wrote while they worked on the first: identities and
/// addresses, which the other nodes must have seen too.
///
/// # Errors
/// An agent is down or does not get there in time; it says which and what it is stuck at.
pub fn settle(lab: &Lab, timeout: Duration, interrupt: &Interrupt) -> anyhow::Result<()> {
    let deadline = span::from_now(timeout);
    for _ in 0..2 {
        settle_once(lab, deadline.saturating_duration_since(Instant::now()), interrupt)?;
    }
    Ok(())
}

/// Waits until every agent enforces everything that is in the store now.
///
/// # Errors
/// As for [`settle`].
pub fn settle_once(lab: &Lab, timeout: Duration, interrupt: &Interrupt) -> anyhow::Result<()> {
    let revision = if lab.has_etcd() {
        let key = format!("{PREFIX}{BARRIER}");
        Some(in_etcd(lab, async |store| store.put(&key, b"", false).await)?)
    } else {
        None
    };
    each_node(lab, |node| settle_node(lab, node, revision, timeout, interrupt)).map(drop)
}

/// Waits until one agent enforces this revision, or everything that is in the store now.
///
/// # Errors
/// It is down or does not get there in time; the error says what it is stuck at. [`super::interrupt::Interrupted`].
pub fn settle_node(
    lab: &Lab,
    node: &Node,
    revision: Option<u64>,
    timeout: Duration,
    interrupt: &Interrupt,
) -> anyhow::Result<()> {
    let deadline = span::from_now(timeout);
    loop {
        interrupt.check()?;
        // In slices, so that an interruption does not have to wait for the whole of it.
        let slice = deadline.saturating_duration_since(Instant::now()).min(WAIT_SLICE);
        let wait = Wait { revision, timeout_ms: Some(slice.as_millis().try_into().unwrap_or(u64::MAX)) };
        // The agent ends the wait; the margin is for its answer.
        let answer = client::call::<Waited>(&lab.agent_socket(&node.name), "wait", &wait, slice + ANSWER_TIMEOUT);
        let log = lab.node_directory(&node.name).join("agent.log");
        match answer {
            Ok(_) => return Ok(()),
            Err(CallError::Refused(refusal)) if refusal.code == "timeout" => {
                if Instant::now() >= deadline {
                    let name = &node.name;
                    let late =
                        format!("node {name} does not enforce everything yet: {refusal} (its log: {})", log.display());
                    let away = status(lab, name).is_ok_and(|status| !status.store.healthy);
                    return Err(if away { without_store(lab, &late).into() } else { anyhow::anyhow!(late) });
                }
            }
            Err(problem) => return Err(no_answer(lab, node, &problem)),
        }
    }
}

/// What policies the agents refused, or have in force in part only, as `namespace/name: why`, each once.
///
/// # Errors
/// An agent is down.
pub fn refused_policies(lab: &Lab) -> anyhow::Result<Vec<String>> {
    let answers = each_node(lab, |node| {
        let socket = lab.agent_socket(&node.name);
        client::call::<Vec<PolicyInfo>>(&socket, "policy.get", &json!({}), ANSWER_TIMEOUT)
            .map_err(|problem| no_answer(lab, node, &problem))
    })?;
    let mut refused: Vec<String> = answers
        .into_iter()
        .flatten()
        .filter_map(|policy| {
            let why = ["refused: ", "in part: "].iter().find_map(|of| policy.state.strip_prefix(of))?;
            Some(format!("{}/{}: {why}", policy.namespace, policy.name))
        })
        .collect();
    refused.sort();
    refused.dedup();
    Ok(refused)
}

/// What agents find wrong with services, as `namespace/name: why`, each once. What they can serve of them they do.
///
/// # Errors
/// An agent is down.
pub fn problems_of_services(lab: &Lab) -> anyhow::Result<Vec<String>> {
    let answers = each_node(lab, |node| status(lab, &node.name).map_err(|problem| no_answer(lab, node, &problem)))?;
    let mut problems: Vec<String> = answers.into_iter().flat_map(|status| status.services.problems).collect();
    problems.sort();
    problems.dedup();
    Ok(problems)
}

/// Runs `work` for all nodes at once; the answers come in the order of the nodes.
///
/// # Errors
/// The first one that `work` met.
pub fn each_node<T: Send>(lab: &Lab, work: impl Fn(&Node) -> anyhow::Result<T> + Sync) -> anyhow::Result<Vec<T>> {
    let work = &work;
    let answers: Vec<anyhow::Result<T>> = std::thread::scope(|scope| {
        let asked: Vec<_> = lab.nodes.iter().map(|node| scope.spawn(move || work(node))).collect();
        asked.into_iter().map(|one| one.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    answers.into_iter().collect()
}

/// Asks one agent how it is.
///
/// # Errors
/// It does not answer.
pub fn status(lab: &Lab, node: &str) -> Result<Status, CallError> {
    client::call(&lab.agent_socket(node), "status", &json!({}), ANSWER_TIMEOUT)
}

/// Asks one agent which containers it has attached.
///
/// # Errors
/// It does not answer.
pub fn endpoints(lab: &Lab, node: &str, timeout: Duration) -> Result<Vec<EndpointInfo>, CallError> {
    client::call(&lab.agent_socket(node), "endpoint.list", &json!({}), timeout)
}

/// The containers that the agents have attached, by the names that a runtime gave them.
///
/// # Errors
/// An agent is down.
pub fn attached(lab: &Lab) -> anyhow::Result<BTreeSet<String>> {
    let answers = each_node(lab, |node| {
        endpoints(lab, &node.name, ANSWER_TIMEOUT).map_err(|problem| no_answer(lab, node, &problem))
    })?;
    Ok(answers.into_iter().flatten().map(|endpoint| endpoint.container_id).collect())
}

/// Calls etcd from inside its namespace.
///
/// # Errors
/// What the call met, and that the lab's etcd may have died.
pub fn in_etcd<T: Send>(lab: &Lab, work: impl AsyncFnOnce(&Etcd) -> Result<T, StoreError> + Send) -> anyhow::Result<T> {
    let namespace = netns::path(&lab.name.net_namespace());
    let runs = process::recorded(&lab.name.directory().join("etcd.pid")).is_some();
    let limit = if runs { lab.patience() } else { lab.patience().min(WITHOUT_ETCD) };
    let outcome = netns::within(&namespace, || {
        netns::block_on(async {
            let store = Etcd::new(&EtcdOptions { request_timeout: limit, ..EtcdOptions::new([etcd_url()]) })?;
            work(&store).await
        })
    })??;
    outcome.map_err(|error| match error {
        StoreError::Unreachable { .. } => without_store(lab, &error.to_string()).into(),
        refused => anyhow::Error::new(refused).context("the lab's etcd refused"),
    })
}

/// The lab's etcd is away, which `met` came of.
fn without_store(lab: &Lab, met: &str) -> NotReachable {
    let (log, name) = (lab.name.directory().join("etcd.log"), &lab.name);
    NotReachable(format!(
        "the lab's etcd does not answer (its log: {}); `cirri lab down --name {name}` and `cirri lab up --name {name}` \
         start afresh: {met}",
        log.display()
    ))
}

/// The error, with the store named if that is away: an agent alone cannot do what it is asked then.
pub fn explain(lab: &Lab, error: anyhow::Error) -> anyhow::Error {
    let decided = error.is::<NotReachable>() || error.is::<Interrupted>();
    if decided || !lab.has_etcd() {
        return error;
    }
    let lab = Lab { patience_s: lab.patience_s.min(WITHOUT_ETCD.as_secs()), ..lab.clone() };
    match resources(&lab) {
        Err(store) if store.is::<NotReachable>() => store.context(format!("{error:#}")),
        _ => error,
    }
}

/// A node's agent has not answered as it should.
fn no_answer(lab: &Lab, node: &Node, problem: &CallError) -> anyhow::Error {
    let log = lab.node_directory(&node.name).join("agent.log");
    let said = format!("the agent of {}: {problem} (its log: {})", node.name, log.display());
    match problem {
        CallError::NoAgent { .. } | CallError::Stopped => {
            let back = format!("{said}; `cirri lab restart --name {} {}` brings it back", lab.name, node.name);
            NotReachable(back).into()
        }
        problem if problem.is_not_reachable() => NotReachable(said).into(),
        _ => anyhow::anyhow!(said),
    }
}

/// The folder of manifests of a lab with one node.
pub fn folder(lab: &Lab) -> PathBuf {
    let node = lab.nodes.first().map_or("", |node| node.name.as_str());
    lab.node_directory(node).join("manifests")
}

/// `resources/Pod/shop/web` as `Pod.shop.web.yaml`: neither kinds nor namespaces hold a dot.
fn file_of(key: &str) -> String {
    let name = key.trim_start_matches(RESOURCES).replacen('/', ".", 2);
    format!("{}.yaml", names::fitting(&name, names::LONGEST))
}

/// Whether a file of the folder is one that [`file_of`] names.
fn is_of_a_resource(file: &str) -> bool {
    file.strip_suffix(".yaml").is_some_and(|name| name.splitn(3, '.').count() == 3)
}

/// The key whose file it is; `None` if that stands in the file alone, because its name was cut.
fn key_of(file: &str) -> Option<String> {
    let mut parts = file.strip_suffix(".yaml")?.splitn(3, '.');
    let (kind, namespace, name) = (parts.next()?, parts.next()?, parts.next()?);
    (!name.contains(names::MARK)).then(|| format!("{RESOURCES}{kind}/{namespace}/{name}"))
}

/// Checks that a lab's nodes all answer, so that a later failure is not blamed on the manifests.
///
/// # Errors
/// Which agent is down, and where its log is.
pub fn check_agents(lab: &Lab) -> Result<(), NotReachable> {
    let down: Vec<&str> = lab
        .nodes
        .iter()
        .filter(|node| lab.agent_process(&node.name).is_none())
        .map(|node| node.name.as_str())
        .collect();
    if down.is_empty() {
        return Ok(());
    }
    let log = lab.node_directory(down[0]).join("agent.log");
    Err(NotReachable(format!(
        "the agent of {} is not running (its log: {}): bring it back with `cirri lab restart --name {} {}`",
        down.join(", "),
        log.display(),
        lab.name,
        down[0]
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_and_its_file_lead_to_each_other() {
        for key in ["resources/Pod/shop/web.v1-0", "resources/Namespace/_/shop"] {
            assert_eq!(key_of(&file_of(key)).as_deref(), Some(key));
        }
        assert!(!is_of_a_resource("Pod.shop.web.yaml.12.tmp") && !is_of_a_resource("notes.yaml"));
        let long = file_of(&format!("resources/Pod/shop/{}", "a".repeat(253)));
        assert!(is_of_a_resource(&long) && long.len() < 255 - ".4194304.tmp".len(), "{long}");
        assert_eq!(key_of(&long), None);
    }
}
