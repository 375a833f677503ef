//! Act 6: a service in front of two replicas.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Instant;

use cirri_control::resource::Resource;
use cirri_flow::{Filter, Record};

use super::super::requests::{self, Asker, Request};
use super::super::traffic::SILENCE;
use super::{LOOK, PODS, POLICIES, Play, ends, find_flow, in_ms, now, parse};
use crate::lab::apply::apply;
use crate::lab::cluster::{self, Change};
use crate::lab::state::PodRecord;
use crate::lab::{cgroup, netns, underlay};
use crate::output::Table;

const SERVICES: &str = include_str!("../../../demo/services.yaml");
const POLICY: &str = include_str!("../../../demo/stall-policy.yaml");

pub(super) const NAMESPACE: &str = "market";
/// The replicas, each on the node of the same place in the lab's list.
pub(super) const REPLICAS: [&str; 2] = ["stall-1", "stall-2"];
/// The service's cluster addresses.
pub(super) const CLUSTER: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)), IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10))];
/// The cluster address of the service by which a node offers its own replicas alone.
const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 11));
pub(super) const PORT: u16 = 80;
pub(super) const NODE_PORT: u16 = 30010;
const LOCAL_NODE_PORT: u16 = 30011;
pub(super) const DSR_NODE_PORT: u16 = 30012;

const CLUSTER_CLAIM: &str = "the cluster addresses: both replicas answer, one also itself, and see the client";
const SNAT_CLAIM: &str =
    "a node's port, from outside: both answer; the one on the other node sees the node that asked it (SNAT)";
const LOCAL_CLAIM: &str = "traffic policy Local: only the node's own replica answers, and sees the client";
const DSR_CLAIM: &str = "direct server return: both answer, and both see the client";

/// Requests of each client to each address. That chance gives all of them to one of two replicas is out of the question.
pub(super) const REQUESTS: usize = 24;
/// A client and an address, and who is to answer there.
struct Row {
    service: &'static str,
    /// What it shows.
    claim: &'static str,
    asker: Asker,
    /// The replicas that answer, with the address of the client that each sees.
    expected: BTreeSet<(String, IpAddr)>,
}

impl Play<'_> {
    /// Act 6.
    pub(super) fn a_service(&self) -> anyhow::Result<()> {
        self.stage.act(
            6,
            "A service",
            "Two replicas (nginx) in the namespace market, one on each node, behind three services:\n\
             stall         10.96.0.10 and fd00:10:96::10, port 80, and port 30010 of every node\n\
             stall-local   port 30011 of every node; a node offers its own replicas alone (traffic policy Local)\n\
             stall-dsr     port 30012 of every node; replicas answer the client directly (direct server return)",
        );
        let begun = Instant::now();
        self.apply_but(&[])?;
        let took = begun.elapsed();
        self.stage.check("they run, and both nodes serve them", Ok(format!("{:.1} s", took.as_secs_f64())));
        let since = now();
        self.who_answers_whom()?;
        let node = self.stalls()?.0.node;
        let world = underlay::WORLD[0].to_string();
        self.stage.command(&node, &format!("cirri observe --from {world} --service market/stall --type new --last 1"));
        let one = |text: &str| vec![text.to_owned()];
        let filter = Filter {
            from: one(&world),
            service: one("market/stall"),
            verdict: one("forwarded"),
            kind: one("new"),
            ..Filter::default()
        };
        let seen = match self.flow(&node, since, filter)? {
            None => Err("no such flow".to_owned()),
            Some(flow) => {
                let chosen = flow.backend.as_ref().map(|backend| backend.name()).unwrap_or_default();
                let record = Record::Flow(Box::new(flow));
                self.stage.text(&cirri_flow::compact_with(&record, self.stage.colours()));
                match REPLICAS.iter().any(|replica| chosen.contains(replica)) {
                    true => Ok(String::new()),
                    false => Err(format!("the backend is {chosen:?}")),
                }
            }
        };
        self.stage.check("a flow names its service, and the replica that was chosen", seen);
        self.may_go_on()?;
        self.a_policy_behind_services()
    }

    fn who_answers_whom(&self) -> anyhow::Result<()> {
        let rows = self.rows()?;
        let patience = self.lab.patience();
        let asked: Vec<anyhow::Result<Vec<Request>>> = std::thread::scope(|scope| {
            let asked: Vec<_> =
                rows.iter().map(|row| scope.spawn(move || requests::ask(&row.asker, REQUESTS, patience))).collect();
            asked.into_iter().map(|one| one.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        });
        let asked: Vec<Vec<Request>> = asked.into_iter().collect::<anyhow::Result<_>>()?;
        self.may_go_on()?;
        let mut table = Table::new(["from", "to", "service", "stall-1", "stall-2"]);
        let mut problems: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for (row, requests) in rows.iter().zip(&asked) {
            let answers = |replica: &str| {
                let answers: Vec<_> = requests
                    .iter()
                    .filter_map(|request| request.outcome.as_ref().ok())
                    .filter(|it| it.by == replica)
                    .collect();
                let clients: BTreeSet<IpAddr> = answers.iter().map(|answer| answer.client).collect();
                let clients: Vec<String> = clients.iter().map(IpAddr::to_string).collect();
                if answers.is_empty() {
                    "-".to_owned()
                } else {
                    format!("{}, saw {}", answers.len(), clients.join(" and "))
                }
            };
            let [first, second] = REPLICAS.map(answers);
            table.row([row.asker.name.clone(), row.asker.to.to_string(), row.service.to_owned(), first, second]);
            if let Err(problem) = row.compare(requests) {
                problems.entry(row.claim).or_default().push(problem);
            }
        }
        self.stage.text(&table.render(None));
        for claim in [CLUSTER_CLAIM, SNAT_CLAIM, LOCAL_CLAIM, DSR_CLAIM] {
            let seen = problems.remove(claim).map_or(Ok(String::new()), |problems| Err(problems.join("\n")));
            self.stage.check(claim, seen);
        }
        Ok(())
    }

    /// Who asks what, and who is to answer.
    fn rows(&self) -> anyhow::Result<Vec<Row>> {
        let (node1, node2) = self.nodes()?;
        let mut rows = Vec::new();
        let both = |first: IpAddr, second: IpAddr| {
            REPLICAS.map(str::to_owned).into_iter().zip([first, second]).collect::<BTreeSet<_>>()
        };
        for client in ["front/ui", "market/stall-1"] {
            let pod = self.lab.pod(&client.parse().map_err(anyhow::Error::msg)?)?;
            for to in CLUSTER {
                let own = self.address(&pod, PORT, to.is_ipv4())?.ip();
                rows.push(Row {
                    service: "stall",
                    claim: CLUSTER_CLAIM,
                    asker: self.asker(client, (to, PORT).into())?,
                    expected: both(own, own),
                });
            }
        }
        for family in 0..2 {
            let (world, first, second) = (underlay::WORLD[family], node1[family], node2[family]);
            let own = BTreeSet::from([(REPLICAS[1].to_owned(), world)]);
            for (service, claim, to, port, expected) in [
                ("stall", SNAT_CLAIM, first, NODE_PORT, both(world, first)),
                ("stall-local", LOCAL_CLAIM, second, LOCAL_NODE_PORT, own),
                ("stall-dsr", DSR_CLAIM, first, DSR_NODE_PORT, both(world, world)),
            ] {
                rows.push(Row { service, claim, asker: self.asker("world", (to, port).into())?, expected });
            }
        }
        rows.sort_by_key(|row| (row.asker.name == "world", row.service != "stall", row.service == "stall-dsr"));
        Ok(rows)
    }

    fn a_policy_behind_services(&self) -> anyhow::Result<()> {
        self.stage.line("");
        self.stage
            .text("The policy stall-clients: the replicas accept namespaces with tier=front and the network outside.");
        let policies = parse("stall-policy.yaml", POLICY)?;
        let put = policies.iter().map(|policy| (policy.store_key(), policy.to_json())).collect();
        let took = self.change(&Change { put, delete: Vec::new() })?;
        let since = now();
        let (node1, node2) = self.nodes()?;
        let allowed = [
            self.asker("front/ui", (CLUSTER[0], PORT).into())?,
            self.asker("world", (node1[0], DSR_NODE_PORT).into())?,
            self.asker("world", (node2[0], LOCAL_NODE_PORT).into())?,
        ];
        let mut problems = Vec::new();
        for asker in &allowed {
            problems.extend(first_failure(&requests::ask(asker, REQUESTS, self.lab.patience())?));
        }
        // On the node of the second replica, which is the only one that it is offered there.
        let scan = self.asker("guest/scan", (LOCAL, PORT).into())?;
        let (_, second) = self.stalls()?;
        let filter = ends("guest/scan", "market/stall-2", "dropped");
        let deadline = crate::span::from_now(self.lab.patience());
        // Silence alone may be a busy machine.
        let flow = loop {
            let refused = requests::ask(&scan, 1, SILENCE)?;
            match refused.first().map(|request| &request.outcome) {
                Some(Err(failed)) if failed.silent() => {}
                other => problems.push(format!("guest/scan → {}: {other:?}", scan.to)),
            }
            let flow = find_flow(&self.lab, &second.node, since, filter.clone(), LOOK, self.interrupt)?;
            if flow.is_some() || !problems.is_empty() || Instant::now() >= deadline {
                break flow;
            }
        };
        self.may_go_on()?;
        let seen =
            if problems.is_empty() { Ok(format!("in force after {}", in_ms(took))) } else { Err(problems.join("\n")) };
        self.stage
            .check("it holds behind every service: front/ui and the host outside pass, guest/scan does not", seen);
        self.stage.command(&second.node, "cirri observe --from guest/scan --to market/stall-2 --last 1");
        self.drop_seen(flow, "it was dropped at the replica: POLICY_DENIED (133)");
        Ok(())
    }

    /// Makes the lab equal to all manifests but these replicas, and waits for all of it.
    pub(super) fn apply_but(&self, without: &[&str]) -> anyhow::Result<()> {
        let mut resources =
            [parse("pods.yaml", PODS)?, parse("policies.yaml", POLICIES)?, parse("services.yaml", SERVICES)?].concat();
        // What has been put into force meanwhile stays.
        let stored = cluster::resources(&self.lab)?;
        resources
            .extend(parse("stall-policy.yaml", POLICY)?.into_iter().filter(|it| stored.contains_key(&it.store_key())));
        resources.retain(|resource| match resource {
            Resource::Pod(pod) => !without.contains(&pod.metadata.name.as_str()),
            _ => true,
        });
        apply(&self.lab, resources, Some(self.lab.patience()), self.interrupt, &|_| {})
    }

    pub(super) fn asker(&self, name: &str, to: SocketAddr) -> anyhow::Result<Asker> {
        let lab = &self.lab.name;
        let (netns, group) = if name == "world" {
            (netns::path(&lab.world_namespace()), cgroup::of(lab, "world")?)
        } else {
            let pod = self.lab.pod(&name.parse().map_err(anyhow::Error::msg)?)?;
            let group = cgroup::of_pod(lab, &pod)?;
            (pod.netns, group)
        };
        cgroup::create(&group)?;
        Ok(Asker { name: name.to_owned(), netns, group, to })
    }

    pub(super) fn stalls(&self) -> anyhow::Result<(PodRecord, PodRecord)> {
        let pod = |name: &str| self.lab.pod(&format!("{NAMESPACE}/{name}").parse().map_err(anyhow::Error::msg)?);
        Ok((pod(REPLICAS[0])?, pod(REPLICAS[1])?))
    }

    /// The addresses of both nodes, IPv4 first.
    pub(super) fn nodes(&self) -> anyhow::Result<([IpAddr; 2], [IpAddr; 2])> {
        match self.lab.nodes.as_slice() {
            [first, second, ..] => Ok(([first, second]).map(|node| [node.ipv4.into(), node.ipv6.into()]).into()),
            _ => anyhow::bail!("the lab has not two nodes"),
        }
    }
}

impl Row {
    /// Whether exactly those answered who were to, every one of them, and saw whom they were to see.
    fn compare(&self, requests: &[Request]) -> Result<(), String> {
        if let Some(problem) = first_failure(requests) {
            return Err(problem);
        }
        let answers = requests.iter().filter_map(|request| request.outcome.as_ref().ok());
        let seen: BTreeSet<(String, IpAddr)> = answers.map(|answer| (answer.by.clone(), answer.client)).collect();
        if seen == self.expected {
            Ok(())
        } else {
            Err(format!("{} → {}: {seen:?}, not {:?}", self.asker.name, self.asker.to, self.expected))
        }
    }
}

/// How many requests failed, and why the first did; nothing if none did.
pub(super) fn first_failure(requests: &[Request]) -> Option<String> {
    let failed: Vec<String> = requests.iter().filter_map(failure).collect();
    let first = failed.first()?;
    Some(format!("{} of {} failed: {first}", failed.len(), requests.len()))
}

/// Who asked whom, and why in vain.
pub(super) fn failure(request: &Request) -> Option<String> {
    let failed = request.outcome.as_ref().err()?;
    Some(format!("{}: {failed}", request.who))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::{Value, json};

    use super::*;
    use crate::demo::requests::Answer;

    #[test]
    fn the_manifests_hold_what_the_acts_speak_of() {
        let resources = parse("services.yaml", SERVICES).unwrap();
        let keys: Vec<String> = resources.iter().map(Resource::store_key).collect();
        for name in REPLICAS {
            assert!(keys.contains(&format!("resources/Pod/{NAMESPACE}/{name}")), "{keys:?}");
        }
        let service = |name: &str| {
            let key = format!("resources/Service/{NAMESPACE}/{name}");
            let found = resources.iter().find(|resource| resource.store_key() == key).unwrap();
            serde_json::from_str::<Value>(&found.to_json()).unwrap()["spec"].take()
        };
        let stall = service("stall");
        assert_eq!(stall["clusterIPs"], json!(CLUSTER));
        assert_eq!((&stall["ports"][0]["port"], &stall["ports"][0]["nodePort"]), (&json!(PORT), &json!(NODE_PORT)));
        let local = service("stall-local");
        assert_eq!((&local["clusterIPs"][0], &local["ports"][0]["nodePort"]), (&json!(LOCAL), &json!(LOCAL_NODE_PORT)));
        assert_eq!(
            (&local["externalTrafficPolicy"], &local["internalTrafficPolicy"]),
            (&json!("Local"), &json!("Local"))
        );
        assert_eq!(service("stall-dsr")["ports"][0]["nodePort"], json!(DSR_NODE_PORT));
        assert_eq!(parse("stall-policy.yaml", POLICY).unwrap().len(), 1);
    }

    #[test]
    fn an_answer_by_another_or_for_another_client_is_not_as_expected() {
        let client = |last| IpAddr::from([10, 0, 0, last]);
        let request = |by: &str, last| Request {
            who: "x/y → z".into(),
            not_before: Instant::now(),
            took: Duration::ZERO,
            outcome: Ok(Answer { by: by.into(), client: client(last) }),
        };
        let row = Row {
            service: "stall",
            claim: CLUSTER_CLAIM,
            asker: Asker { name: "x/y".into(), netns: "".into(), group: "".into(), to: (client(9), 80).into() },
            expected: BTreeSet::from([("a".to_owned(), client(1)), ("b".to_owned(), client(2))]),
        };
        assert_eq!(row.compare(&[request("a", 1), request("b", 2), request("a", 1)]), Ok(()));
        for wrong in [[request("a", 1), request("a", 1)], [request("a", 1), request("b", 1)]] {
            assert!(row.compare(&wrong).unwrap_err().starts_with("x/y → 10.0.0.9:80: {"));
        }
    }
}
