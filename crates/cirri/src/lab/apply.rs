//! `cirri lab apply`: makes a lab equal to its manifests.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::bail;
use cirri_control::resource::{Pod, Resource};

use super::cluster::{self, Change};
use super::interrupt::Interrupt;
use super::spaces::{self, Spaces};
use super::state::{DEFAULT_NAME, Lab, LabName, PodKey, PodRecord, PodSpec};
use super::{allot, cgroup, disk, manifests, pods, routes, status};
use crate::{output, span};

/// Pods made or removed at once.
const PARALLEL: usize = 8;
/// How long the agents may take to learn of new pods before these are attached all the same.
const BEFORE_ATTACHING: Duration = Duration::from_secs(10);

/// Arguments of `cirri lab apply`.
#[derive(Debug, clap::Args)]
#[command(after_help = "The folder is the whole truth: what it does not hold is removed from the lab. Everything is
checked first; an error changes nothing and ends with exit code 2. A pod whose programs, ports or node change is
made anew; a change of labels alone leaves it running.")]
pub struct ApplyArgs {
    /// The lab.
    #[arg(long, default_value = DEFAULT_NAME)]
    name: LabName,
    /// A directory of manifests, or a file; may be given several times.
    #[arg(short = 'f', long = "filename", required = true, value_name = "DIR|FILE")]
    files: Vec<PathBuf>,
    /// Return only when everything is enforced on every node and every declared port is open.
    #[arg(long)]
    wait: bool,
    /// How long --wait, and a call to the store, may take, in seconds [default: that of `lab up`]
    #[arg(long, value_name = "SECONDS", value_parser = span::seconds())]
    timeout: Option<u64>,
}

/// Carries the command out.
///
/// # Errors
/// Refused manifests, or what went wrong on the way; another apply goes on from there.
pub fn run(args: ApplyArgs) -> anyhow::Result<ExitCode> {
    let (mut lab, _lock) = Lab::locked(&args.name)?;
    lab.patience_s = args.timeout.unwrap_or(lab.patience_s);
    let explain = |error| disk::explain(&args.name, error);
    let interrupt = Interrupt::install()?;
    let wait = args.wait.then(|| lab.patience());
    apply(&lab, manifests::read(&args.files)?, wait, &interrupt, &output::progress).map_err(explain)?;
    Ok(ExitCode::SUCCESS)
}

/// Makes the lab equal to the manifests, and waits for all of it if `wait` says how long. `report` is told what was
/// done, a line each.
///
/// # Errors
/// As for [`run`].
pub fn apply(
    lab: &Lab,
    resources: Vec<Resource>,
    wait: Option<Duration>,
    interrupt: &Interrupt,
    report: &dyn Fn(&str),
) -> anyhow::Result<()> {
    manifests::check(&resources, lab)?;
    cluster::check_agents(lab)?;
    cgroup::of_lab(&lab.name)?;
    let begun = Instant::now();
    let deadline = wait.map(span::from_now);
    let stored = cluster::resources(lab)?;
    let resources = allot::allot(resources, &stored)?;
    let routes = routes::wanted(lab, &resources)?;
    let mut running = lab.pods()?;
    let attached = cluster::attached(lab)?;
    for pod in &mut running {
        // One that lost its device, or that its agent does not know any more, is made anew.
        pod.complete &= pods::is_attached(pod) && (pod.spec.host_network || attached.contains(&pod.container_id));
    }
    let mut plan = Plan::new(lab, resources, &running, &stored);

    let mut problems = Vec::new();
    let mut tell = |outcomes: Vec<anyhow::Result<String>>| {
        for outcome in outcomes {
            match outcome {
                Ok(done) => report(&done),
                Err(problem) => problems.push(format!("{problem:#}")),
            }
        }
    };
    interrupt.check()?;
    tell(in_parallel(&plan.remove, interrupt, |pod| {
        pods::remove(lab, pod)?;
        Ok(format!("pod {} stopped", pod.key))
    })?);
    // A pod that would not go keeps its record and its place, and the next apply tries again.
    let stayed = lab.pods()?;
    for name in spaces::sweep(lab, &stayed)? {
        report(&format!("network namespace {name} removed: a command that was killed had left it"));
    }
    let spaces = Spaces::of(lab, &stayed);
    let stayed: BTreeSet<&PodKey> = stayed.iter().map(|pod| &pod.key).collect();
    routes::put(lab, &routes)?;
    // Policies are there before the pods they protect.
    cluster::change(lab, &plan.change)?;
    tell(plan.described.iter().cloned().map(Ok).collect());
    if !plan.create.is_empty() {
        // An agent that knows a pod before it is attached gives it the right identity from the start. One that does
        // not get there corrects it later, and --wait says what keeps it.
        if let Err(problem) = cluster::settle_once(lab, BEFORE_ATTACHING, interrupt) {
            output::complain(&format!("{problem:#}"));
        }
    }
    plan.create.retain(|(key, ..)| !stayed.contains(key));
    tell(in_parallel(&plan.create, interrupt, |(key, spec, node)| {
        let node = lab.node(node)?;
        let pod = pods::create(lab, key, spec, node, &spaces)?;
        let addresses: Vec<String> = pod.addresses.iter().map(ToString::to_string).collect();
        Ok(format!("pod {key} runs on {} ({})", pod.node, addresses.join(", ")))
    })?);
    interrupt.check()?;
    if let Some(deadline) = deadline {
        for pod in lab.pods()?.iter().filter(|pod| pod.complete) {
            pods::await_listening(lab, pod, deadline, interrupt)?;
        }
    }
    // As a kubelet does: a pod that runs has addresses and is ready.
    cluster::change(lab, &plan.observed(&lab.pods()?))?;
    if !problems.is_empty() {
        bail!("{}\nthe rest was applied; apply again to retry", problems.join("\ncirri: "));
    }
    match deadline {
        Some(deadline) => {
            await_all(lab, deadline, interrupt)?;
            let (nodes, seconds) = (lab.nodes.len(), begun.elapsed().as_secs_f64());
            report(&format!("enforced on {nodes} node{} after {seconds:.2} s", if nodes == 1 { "" } else { "s" }));
        }
        None => report(&format!(
            "applied in {:.1} s; agents may still be at work (--wait waits for them)",
            begun.elapsed().as_secs_f64()
        )),
    }
    Ok(())
}

fn await_all(lab: &Lab, deadline: Instant, interrupt: &Interrupt) -> anyhow::Result<()> {
    cluster::settle(lab, deadline.saturating_duration_since(Instant::now()), interrupt)?;
    for problem in cluster::problems_of_services(lab)? {
        output::complain(&problem);
    }
    let refused = cluster::refused_policies(lab)?;
    if !refused.is_empty() {
        bail!("refused, the last good version stays in force: {}", refused.join("\ncirri: "));
    }
    Ok(())
}

/// What has to be done, and nothing that is done already.
#[derive(Debug, Default)]
struct Plan {
    /// Pods to stop: gone, changed, or left incomplete by an earlier failure.
    remove: Vec<PodRecord>,
    /// What changes in the store.
    change: Change,
    /// The same in words.
    described: Vec<String>,
    /// Pods to make, with their node.
    create: Vec<(PodKey, PodSpec, String)>,
    /// The manifests of these, as JSON.
    manifests: BTreeMap<PodKey, String>,
}

impl Plan {
    fn new(lab: &Lab, resources: Vec<Resource>, running: &[PodRecord], stored: &BTreeMap<String, String>) -> Self {
        let mut plan = Self::default();
        let mut desired = BTreeMap::new();
        let running: BTreeMap<&PodKey, &PodRecord> = running.iter().map(|pod| (&pod.key, pod)).collect();
        let mut load: BTreeMap<&str, usize> = lab.nodes.iter().map(|node| (node.name.as_str(), 0)).collect();
        let (wanted, others): (Vec<Resource>, Vec<Resource>) =
            resources.into_iter().partition(|resource| matches!(resource, Resource::Pod(_)));
        desired.extend(others.iter().map(|resource| (resource.store_key(), resource.to_json())));

        // Pods that have a node, by their manifest or because they run there, are counted before the others are spread.
        let mut wanted: Vec<(PodKey, PodSpec, Pod)> = wanted
            .into_iter()
            .filter_map(|resource| match resource {
                Resource::Pod(pod) => {
                    let key = PodKey { namespace: pod.namespace().to_owned(), name: pod.metadata.name.clone() };
                    Some((key, PodSpec::from(&pod), pod))
                }
                _ => None,
            })
            .collect();
        for (key, spec, pod) in &mut wanted {
            let kept = running.get(key).filter(|record| record.complete && record.spec == *spec);
            if pod.spec.node_name.is_none() {
                pod.spec.node_name = kept.map(|record| record.node.clone());
            }
            if let Some(count) = pod.spec.node_name.as_deref().and_then(|node| load.get_mut(node)) {
                *count += 1;
            }
        }
        for (key, spec, mut pod) in wanted {
            let node = pod.spec.node_name.take().unwrap_or_else(|| {
                let least = lab.nodes.iter().min_by_key(|node| load.get(node.name.as_str()).copied());
                let name = least.map(|node| node.name.clone()).unwrap_or_default();
                if let Some(count) = load.get_mut(name.as_str()) {
                    *count += 1;
                }
                name
            });
            pod.spec.node_name = Some(node.clone());
            let resource = Resource::Pod(pod);
            let json = resource.to_json();
            match running.get(&key) {
                Some(record) if record.complete && record.spec == spec && record.node == node => {
                    desired.insert(resource.store_key(), status::observed(&json, record));
                }
                record => {
                    desired.insert(resource.store_key(), status::pending(&json));
                    plan.remove.extend(record.map(|record| (*record).clone()));
                    plan.manifests.insert(key.clone(), json);
                    plan.create.push((key, spec, node));
                }
            }
        }
        let gone = running.values().filter(|pod| !desired.contains_key(&pod.key.store_key()));
        plan.remove.extend(gone.map(|pod| (*pod).clone()));

        for (key, json) in desired.iter() {
            let verb = match stored.get(key) {
                Some(old) if old == json => continue,
                Some(_) => "changed",
                None => "created",
            };
            plan.described.push(format!("{} {verb}", manifests::describe_key(key)));
            plan.change.put.insert(key.clone(), json.clone());
        }
        for key in stored.keys().filter(|key| !desired.contains_key(*key)) {
            plan.described.push(format!("{} removed", manifests::describe_key(key)));
            plan.change.delete.push(key.clone());
        }
        plan
    }

    /// What the store is to say of the pods that were made, once they run.
    fn observed(&self, running: &[PodRecord]) -> Change {
        let json = |pod: &PodRecord| Some(status::observed(self.manifests.get(&pod.key)?, pod));
        let running = running.iter().filter(|pod| pod.complete);
        let put = running.filter_map(|pod| Some((pod.key.store_key(), json(pod)?))).collect();
        Change { put, delete: Vec::new() }
    }
}

/// Does `work` for all items, a few at a time; stops taking new ones when interrupted. The outcomes come in the order
/// of the items.
fn in_parallel<T: Sync, R: Send>(
    items: &[T],
    interrupt: &Interrupt,
    work: impl Fn(&T) -> anyhow::Result<R> + Sync,
) -> anyhow::Result<Vec<anyhow::Result<R>>> {
    let next = Mutex::new(items.iter().enumerate());
    let done = Mutex::new(BTreeMap::new());
    let lock = |mutex| Mutex::lock(mutex).unwrap_or_else(std::sync::PoisonError::into_inner);
    std::thread::scope(|scope| {
        for _ in 0..PARALLEL.min(items.len()) {
            scope.spawn(|| {
                while interrupt.check().is_ok() {
                    let Some((index, item)) = lock(&next).next() else { return };
                    let outcome = work(item);
                    done.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(index, outcome);
                }
            });
        }
    });
    interrupt.check()?;
    Ok(done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).into_values().collect())
}

#[cfg(test)]
mod tests {
    use cirri_control::resource::parse_documents;

    use super::super::state::Routing;
    use super::super::underlay;
    use super::*;

    fn lab() -> Lab {
        let name: LabName = "t".parse().unwrap();
        let nodes = ["n1", "n2"].iter().enumerate().map(|(index, node)| underlay::node(&name, node, index)).collect();
        Lab { nodes, ..Lab::described(&name, &[], Routing::Overlay, &[]) }
    }

    fn pods(text: &str) -> Vec<Resource> {
        parse_documents("test.yaml", text).unwrap()
    }

    fn pod(name: &str, extra: &str) -> String {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: {name}}}}}\nspec:\n  containers: [{{name: c, ports: [{{containerPort: 80}}]}}]\n{extra}"
        )
    }

    fn record(plan: &Plan, index: usize) -> PodRecord {
        let (key, spec, node) = &plan.create[index];
        PodRecord {
            key: key.clone(),
            node: node.clone(),
            netns: "/run/netns/x".into(),
            container_id: "x".into(),
            addresses: vec!["10.244.0.2".parse().unwrap()],
            spec: spec.clone(),
            complete: true,
            error: None,
        }
    }

    /// What is in the store once a plan was carried out.
    fn stored(plan: &Plan, running: &[PodRecord]) -> BTreeMap<String, String> {
        let mut stored = plan.change.put.clone();
        stored.extend(plan.observed(running).put);
        stored
    }

    #[test]
    fn pods_are_spread_around_those_that_name_a_node() {
        let text =
            [pod("a", "  nodeName: n1\n"), pod("b", "  nodeName: n1\n"), pod("c", ""), pod("d", ""), pod("e", "")];
        let plan = Plan::new(&lab(), pods(&text.concat()), &[], &BTreeMap::new());
        let nodes: Vec<&str> = plan.create.iter().map(|(_, _, node)| node.as_str()).collect();
        assert_eq!(nodes, ["n1", "n1", "n2", "n2", "n1"]);
    }

    #[test]
    fn what_is_as_desired_is_left_alone_and_labels_change_without_a_restart() {
        let first = Plan::new(&lab(), pods(&pod("a", "")), &[], &BTreeMap::new());
        let running = [record(&first, 0)];
        let stored = stored(&first, &running);
        assert!(stored["resources/Pod/default/a"].contains("10.244.0.2"), "{stored:?}");
        let again = Plan::new(&lab(), pods(&pod("a", "")), &running, &stored);
        assert!(again.change.is_empty() && again.create.is_empty() && again.remove.is_empty(), "{again:?}");

        let relabelled = pod("a", "").replace("app: a", "app: b");
        let plan = Plan::new(&lab(), pods(&relabelled), &running, &stored);
        assert_eq!(
            (plan.described.as_slice(), plan.create.len()),
            (["pod default/a changed".to_owned()].as_slice(), 0)
        );
    }

    #[test]
    fn a_pod_moves_when_it_names_another_node_and_stays_when_it_names_none() {
        let there = Plan::new(&lab(), pods(&pod("a", "  nodeName: n2\n")), &[], &BTreeMap::new());
        let running = [record(&there, 0)];
        let stays = Plan::new(&lab(), pods(&pod("a", "")), &running, &stored(&there, &running));
        assert!(stays.change.is_empty() && stays.create.is_empty() && stays.remove.is_empty(), "{stays:?}");
        let moves = Plan::new(&lab(), pods(&pod("a", "  nodeName: n1\n")), &running, &there.change.put);
        assert_eq!((moves.remove[0].node.as_str(), moves.create[0].2.as_str()), ("n2", "n1"));
    }

    #[test]
    fn a_changed_port_restarts_a_vanished_pod_goes_and_a_half_made_one_is_made_anew() {
        let both = [pod("a", ""), pod("b", "")].concat();
        let first = Plan::new(&lab(), pods(&both), &[], &BTreeMap::new());
        let mut running = [record(&first, 0), record(&first, 1)];
        let changed = pod("a", "").replace("containerPort: 80", "containerPort: 81");
        let plan = Plan::new(&lab(), pods(&changed), &running, &first.change.put);
        assert_eq!((plan.remove.len(), plan.create.len(), plan.change.delete.len()), (2, 1, 1));
        let nothing = Plan::new(&lab(), Vec::new(), &running, &first.change.put);
        assert_eq!((nothing.remove.len(), nothing.create.len(), nothing.change.delete.len()), (2, 0, 2));

        running[1].complete = false;
        let plan = Plan::new(&lab(), pods(&both), &running, &first.change.put);
        assert_eq!((plan.remove.len(), plan.create.len()), (1, 1));
        assert_eq!(plan.create[0].0.name, "b");
    }
}
