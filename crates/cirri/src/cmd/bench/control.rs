//! `cirri bench control`: how long from a manifest to its enforcement, how long an endpoint takes to
//! be ready, and what the agent weighs.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;

use super::labs::{self, BenchLab};
use super::stats::{self, Spread};

/// How much to measure.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Numbers of policies.
    pub policies: &'static [usize],
    /// How often one more is applied at each.
    pub more: usize,
    /// Pods attached.
    pub pods: usize,
}

/// The result.
#[derive(Clone, Debug, Serialize)]
pub struct Control {
    /// Milliseconds that `cirri lab apply --wait` takes when nothing has changed: a process, two
    /// barriers through the store, an answer of every agent. Part of all that follows.
    pub apply_nothing_ms: f64,
    pub policies: Vec<Policies>,
    pub attach: Attach,
}

/// Times at one number of policies.
#[derive(Clone, Debug, Serialize)]
pub struct Policies {
    pub policies: usize,
    /// All that are new at this step, from `apply` to enforced.
    pub all_ms: f64,
    /// How many those are.
    pub new: usize,
    /// `apply --wait` when nothing has changed: reading and comparing so many manifests.
    pub nothing_ms: f64,
    /// One more policy, from `apply` to enforced.
    pub one_more_ms: Spread,
    /// Resident memory of the agent afterwards, MiB.
    pub agent_mib: f64,
}

/// Attaching pods by CNI ADD.
#[derive(Clone, Debug, Serialize)]
pub struct Attach {
    pub pods: usize,
    /// As the agent reports: from the request to a device that works under its policy.
    pub ready_ms_p50: f64,
    pub ready_ms_p99: f64,
    /// `apply --wait` of all of them, plugin processes, namespaces and manifests included, a pod.
    pub wall_ms_a_pod: f64,
    /// Resident memory of the agent before and after, MiB.
    pub agent_mib_before: f64,
    pub agent_mib: f64,
}

/// Measures.
pub fn run(plan: &Plan) -> Result<Control> {
    super::instance::sweep(Path::new("/sys/fs/bpf/cirri"));
    eprintln!("cirri: bringing up a lab of one node");
    let lab = BenchLab::up("c", 1, "overlay")?;
    let base = [labs::pod("client", "node1", "client"), labs::pod("server", "node1", "role0")].concat();
    lab.write("base.yaml", &format!("{}{base}", labs::NAMESPACE))?;
    lab.apply()?;
    let nothing = (0..plan.more).map(|_| timed(&lab)).collect::<Result<Vec<_>>>()?;
    let attach = attach(plan, &lab)?;
    let mut policies = Vec::new();
    let mut there = 0;
    for wanted in plan.policies {
        eprintln!("cirri: {wanted} policies");
        let text: String = (there..*wanted).map(|n| labs::policy(&format!("policy{n}"), &role(n), 1 + n % 5)).collect();
        lab.write(&format!("policies{wanted}.yaml"), &text)?;
        let new = wanted - there;
        let all_ms = timed(&lab)?;
        there = *wanted;
        let nothing = (0..plan.more).map(|_| timed(&lab)).collect::<Result<Vec<_>>>()?;
        let nothing_ms = stats::quantile(&nothing, 0.5).context("no rounds")?;
        let mut rounds = Vec::new();
        for n in 0..plan.more {
            lab.write("more.yaml", &labs::policy("more", &role(0), 2 + n))?;
            rounds.push(timed(&lab)?);
        }
        let one_more_ms = Spread::of(&rounds).context("no rounds")?;
        policies.push(Policies {
            policies: *wanted,
            all_ms,
            new,
            nothing_ms,
            one_more_ms,
            agent_mib: agent_mib(&lab)?,
        });
    }
    let apply_nothing_ms = stats::quantile(&nothing, 0.5).context("no rounds")?;
    Ok(Control { apply_nothing_ms, policies, attach })
}

fn attach(plan: &Plan, lab: &BenchLab) -> Result<Attach> {
    eprintln!("cirri: attaching {} pods", plan.pods);
    let agent_mib_before = agent_mib(lab)?;
    let before = ready(lab)?.len();
    let pods: String = (0..plan.pods).map(|n| labs::pod(&format!("pod{n}"), "node1", &role(n))).collect();
    lab.write("pods.yaml", &pods)?;
    let wall = timed(lab)?;
    let ready: Vec<f64> = ready(lab)?.split_off(before);
    let quantile = |q| stats::quantile(&ready, q).context("the agent's log names no attachment");
    Ok(Attach {
        pods: ready.len(),
        ready_ms_p50: quantile(0.5)?,
        ready_ms_p99: quantile(0.99)?,
        wall_ms_a_pod: wall / plan.pods as f64,
        agent_mib_before,
        agent_mib: agent_mib(lab)?,
    })
}

/// Pods and policies are of ten kinds.
fn role(n: usize) -> String {
    format!("role{}", n % 10)
}

/// Milliseconds of one `apply --wait`.
fn timed(lab: &BenchLab) -> Result<f64> {
    let begun = Instant::now();
    lab.apply()?;
    Ok(begun.elapsed().as_secs_f64() * 1e3)
}

/// What the agent has said about every attachment so far, milliseconds.
fn ready(lab: &BenchLab) -> Result<Vec<f64>> {
    let node = lab.info()?.nodes.into_iter().next().context("a lab without a node")?;
    let log = std::fs::read_to_string(&node.log).with_context(|| format!("cannot read {}", node.log.display()))?;
    Ok(log.lines().filter(|line| line.contains("attached")).filter_map(|line| value_of(line, "ready_ms")).collect())
}

/// A number that stands as `name=number` in a line.
fn value_of(line: &str, name: &str) -> Option<f64> {
    line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
}

/// Resident memory of the first node's agent.
fn agent_mib(lab: &BenchLab) -> Result<f64> {
    let node = lab.info()?.nodes.into_iter().next().context("a lab without a node")?;
    let pid = node.pid.context("the agent is down")?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).context("the agent is down")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib / 1024.0)
}

/// In words.
pub fn shown(control: &Control) -> String {
    let mut text = format!("apply --wait without a change: {:.0} ms\n", control.apply_nothing_ms);
    for at in &control.policies {
        let Spread { min, median, .. } = at.one_more_ms;
        text += &format!(
            "{} policies: {} new at once {:.0} ms, nothing new {:.0} ms, one more {min:.0} min / {median:.0} median ms, \
             agent {:.1} MiB\n",
            at.policies, at.new, at.all_ms, at.nothing_ms, at.agent_mib
        );
    }
    let attach = &control.attach;
    text += &format!(
        "{} pods attached: ready in p50 {:.1} ms, p99 {:.1} ms; {:.0} ms wall each; agent {:.1} -> {:.1} MiB\n",
        attach.pods,
        attach.ready_ms_p50,
        attach.ready_ms_p99,
        attach.wall_ms_a_pod,
        attach.agent_mib_before,
        attach.agent_mib
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_read_by_its_name() {
        assert_eq!(value_of("attached endpoint=3 ready_ms=12 pod=web", "ready_ms"), Some(12.0));
        assert_eq!(value_of("attached not_ready_ms=7", "ready_ms"), None);
        assert_eq!(value_of("attached", "ready_ms"), None);
    }
}
