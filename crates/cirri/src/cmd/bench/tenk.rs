//! Ten thousand services on a real agent: how long until they are in force, how long one change takes while
//! they stand, and what they weigh. Written to the lab's etcd as Kubernetes resources.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cirri_store::{Etcd, EtcdOptions, PREFIX, Store};
use serde::Serialize;
use serde_json::{Value, json};

use super::labs::BenchLab;
use super::stats;
use crate::client;
use crate::lab::netns;

/// How much.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub services: usize,
    pub changes: usize,
}

/// What came of it. Milliseconds and MiB.
#[derive(Clone, Debug, Serialize)]
pub struct TenK {
    pub services: usize,
    pub backends: usize,
    /// Until all resources were in etcd, and until node 1 enforced them, both from the first write.
    pub written_ms: f64,
    pub applied_ms: f64,
    pub changes: usize,
    /// One change, from before it is written to etcd until the agent says that it is enforced.
    pub change_p50_ms: f64,
    pub change_p99_ms: f64,
    /// The agent's own part, from seeing it to the kernel, as `cirri status` says.
    pub seen_p50_ms: f64,
    pub seen_p99_ms: f64,
    /// The agent, before and with all of them.
    pub agent_mib: [f64; 2],
    /// Kernel memory of its maps, likewise.
    pub maps_mib: [f64; 2],
}

const BACKENDS: usize = 10;
const PATIENCE: Duration = Duration::from_secs(120);
const ETCD: &str = "http://172.31.255.1:2379";

/// Measures, in a lab of two nodes.
pub fn run(plan: &Plan) -> Result<TenK> {
    super::instance::sweep(Path::new("/sys/fs/bpf/cirri"));
    eprintln!("cirri: bringing up a lab for {} services", plan.services);
    let lab = BenchLab::up("k", 2, "direct")?;
    let info = lab.info()?;
    let socket = info.nodes.first().context("a lab without a node")?.socket.clone();
    let node = Node { socket, etcd: info.net };
    let before = node.memory()?;
    let all: Vec<(String, String)> = (0..plan.services).flat_map(|n| [service(n), slice(n, 0)]).collect();
    let begun = Instant::now();
    let revision = node.put(&all)?;
    let written = begun.elapsed();
    node.wait(revision)?;
    let applied = begun.elapsed();
    let with = node.memory()?;
    let (mut took, mut seen) = (Vec::new(), Vec::new());
    for change in 0..plan.changes {
        let one = [slice(change * 7 % plan.services, change % 2 + 1)];
        let begun = Instant::now();
        let revision = node.put(&one)?;
        node.wait(revision)?;
        took.push(ms(begun.elapsed()));
        let last = node.status()?.pointer("/latency/last_us").and_then(Value::as_f64);
        seen.push(last.context("no latency in its status")? / 1e3);
    }
    let quantile = |of: &[f64], share| stats::quantile(of, share).context("no changes");
    Ok(TenK {
        services: plan.services,
        backends: BACKENDS,
        written_ms: ms(written),
        applied_ms: ms(applied),
        changes: plan.changes,
        change_p50_ms: quantile(&took, 0.5)?,
        change_p99_ms: quantile(&took, 0.99)?,
        seen_p50_ms: quantile(&seen, 0.5)?,
        seen_p99_ms: quantile(&seen, 0.99)?,
        agent_mib: [before.0, with.0],
        maps_mib: [before.1, with.1],
    })
}

/// A node's agent, and the store that it follows.
struct Node {
    socket: PathBuf,
    /// The namespace that etcd listens in.
    etcd: PathBuf,
}

impl Node {
    /// Writes resources; the revision that holds them.
    fn put(&self, resources: &[(String, String)]) -> Result<u64> {
        let write = || async {
            let store = Etcd::new(&EtcdOptions::new([ETCD]))?;
            for chunk in resources.chunks(100) {
                let keys: Vec<String> = chunk.iter().map(|(key, _)| format!("{PREFIX}{key}")).collect();
                let pairs: Vec<(&str, &[u8])> =
                    keys.iter().zip(chunk).map(|(key, (_, json))| (key.as_str(), json.as_bytes())).collect();
                store.put_all(&pairs).await?;
            }
            anyhow::Ok(store.health().await?.revision)
        };
        netns::within_async(&self.etcd, write)?
    }

    fn wait(&self, revision: u64) -> Result<()> {
        let question = json!({"revision": revision, "timeout_ms": PATIENCE.as_millis() as u64});
        let answer: Value = client::call(&self.socket, "wait", &question, PATIENCE)?;
        let enforced = answer.get("enforced_revision").and_then(Value::as_u64);
        anyhow::ensure!(enforced >= Some(revision), "revision {revision} is not enforced: {answer}");
        Ok(())
    }

    fn status(&self) -> Result<Value> {
        Ok(client::call(&self.socket, "status", &json!({}), PATIENCE)?)
    }

    /// Resident memory of the agent, and kernel memory of its maps, MiB.
    fn memory(&self) -> Result<(f64, f64)> {
        let mib = |bytes: f64| bytes / 1_048_576.0;
        let agent = self.status()?.get("memory_bytes").and_then(Value::as_f64).context("no memory in its status")?;
        let maps: Vec<Value> = client::call(&self.socket, "map.list", &json!({}), PATIENCE)?;
        let maps = maps.iter().filter_map(|map| map.get("memory_bytes")?.as_f64()).sum();
        Ok((mib(agent), mib(maps)))
    }
}

fn ms(took: Duration) -> f64 {
    took.as_secs_f64() * 1e3
}

/// A service, as the store has it: key and JSON.
fn service(n: usize) -> (String, String) {
    let ip = format!("10.{}.{}.{}", 100 + n / 65_536, n / 256 % 256, n % 256);
    let json = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": format!("s{n}"), "namespace": "load"},
        "spec": {"clusterIP": ip, "ports": [{"name": "http", "port": 80}]}
    });
    (format!("resources/Service/load/s{n}"), json.to_string())
}

/// Its backends; the first one's address says which version this is.
fn slice(n: usize, version: usize) -> (String, String) {
    let endpoint = |i: usize| {
        let host = if i == 0 { 200 + version } else { i };
        json!({"addresses": [format!("10.{}.{}.{host}", 200 + n / 256, n % 256)], "conditions": {"ready": true}})
    };
    let json = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("s{n}-1"), "namespace": "load", "labels": {"kubernetes.io/service-name": format!("s{n}")}
        },
        "addressType": "IPv4", "ports": [{"name": "http", "port": 8080}],
        "endpoints": (0..BACKENDS).map(endpoint).collect::<Vec<Value>>()
    });
    (format!("resources/EndpointSlice/load/s{n}-1"), json.to_string())
}

/// In words.
pub fn shown(it: &TenK) -> String {
    format!(
        "{} services x {} backends: in etcd after {:.0} ms, in force after {:.0} ms\n\
         one change of {}: p50 {:.1} ms, p99 {:.1} ms from before its write; from seen to the kernel {:.2} ms, {:.2} ms\n\
         agent {:.1} -> {:.1} MiB, maps {:.1} -> {:.1} MiB\n",
        it.services,
        it.backends,
        it.written_ms,
        it.applied_ms,
        it.changes,
        it.change_p50_ms,
        it.change_p99_ms,
        it.seen_p50_ms,
        it.seen_p99_ms,
        it.agent_mib[0],
        it.agent_mib[1],
        it.maps_mib[0],
        it.maps_mib[1]
    )
}

/// The part of a report.
pub fn write(it: &TenK, text: &mut String) {
    let lines = shown(it).trim_end().replace('\n', "\n- ");
    text.push_str(&format!(
        "\n## Ten thousand services on an agent\n\nA lab of two nodes, both of which follow its etcd, on the same processors as etcd \
         and the writer; figures of node 1.\n\n- {lines}\n"
    ));
}
