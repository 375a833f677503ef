//! The acts.

mod replicas;
mod services;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use cirri_control::resource::{Resource, parse_documents};
use cirri_flow::{Filter, Flow, Record, RuleKind, Verdict};
use serde_json::json;

use super::stage::Stage;
use super::traffic::{self, Client, Held, Reach, Server};
use crate::api::{EndpointInfo, Explanation, Observe, PolicyExplain};
use crate::client::{self, CallError};
use crate::exit::{Error, Failure};
use crate::lab::apply::apply;
use crate::lab::cluster::{self, Change};
use crate::lab::interrupt::{Interrupt, Interrupted};
use crate::lab::state::{Lab, LabName, PodRecord, Routing};
use crate::lab::{netns, process, underlay, up};
use crate::output::Table;

const PODS: &str = include_str!("../../demo/pods.yaml");
const POLICIES: &str = include_str!("../../demo/policies.yaml");

/// How long agents may take to enforce something, or to come back.
const SETTLE: Duration = Duration::from_secs(60);
/// How long an agent may take to answer.
const ANSWER: Duration = Duration::from_secs(5);
/// How long a held connection may take to answer; the retransmission of a lost packet included.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a closed connection has to stay silent.
const SILENCE: Duration = Duration::from_secs(1);
/// How long requests run on before the agents are killed, and again while there is none.
const PAUSE: Duration = Duration::from_millis(700);

/// Plays all acts.
///
/// # Errors
/// What could not even be tried; a claim that does not hold is a failed check, not an error. [`Interrupted`].
pub fn play(stage: &Stage, name: &LabName, interrupt: &Interrupt) -> anyhow::Result<Lab> {
    let lab = cluster_up(stage, name, interrupt)?;
    let play = Play::new(stage, lab, interrupt)?;
    play.everything_talks()?;
    play.may_go_on()?;
    let since = play.a_policy()?;
    play.may_go_on()?;
    play.the_flows(since)?;
    play.may_go_on()?;
    play.in_the_middle()?;
    play.may_go_on()?;
    play.without_agents()?;
    play.may_go_on()?;
    play.a_service()?;
    play.may_go_on()?;
    play.replicas_go()?;
    Ok(play.lab)
}

/// Act 1.
fn cluster_up(stage: &Stage, name: &LabName, interrupt: &Interrupt) -> anyhow::Result<Lab> {
    stage.act(
        1,
        "The cluster",
        "Two nodes, an agent on each, etcd between them. Pods are attached by the CNI plugin and run real programs.",
    );
    let begun = Instant::now();
    let nodes = ["node1".to_owned(), "node2".to_owned()];
    let lab = Lab::described(name, &nodes, Routing::Overlay, &[]);
    up::bring_up(&lab, interrupt, &|_| {})?;
    let ready = begun.elapsed();
    stage.check("two nodes, their agents ready", Ok(format!("{:.1} s", ready.as_secs_f64())));
    let begun = Instant::now();
    apply(&lab, parse("pods.yaml", PODS)?, Some(SETTLE), interrupt, &|_| {})?;
    let took = begun.elapsed();

    let pods = lab.pods()?;
    let endpoints = cluster::each_node(&lab, |node| {
        client::call::<Vec<EndpointInfo>>(&lab.agent_socket(&node.name), "endpoint.list", &json!({}), ANSWER)
            .with_context(|| format!("the agent of {}", node.name))
    })?;
    let endpoints: Vec<EndpointInfo> = endpoints.into_iter().flatten().collect();
    let mut table = Table::new(["pod", "node", "identity", "IPv4", "IPv6", "runs"]);
    for pod in &pods {
        let identity = endpoints
            .iter()
            .find(|endpoint| endpoint.namespace == pod.key.namespace && endpoint.pod == pod.key.name)
            .map_or("-".to_owned(), |endpoint| endpoint.identity.to_string());
        let address = |wanted: fn(&IpAddr) -> bool| {
            pod.addresses.iter().copied().find(wanted).map_or("-".to_owned(), |address| address.to_string())
        };
        let runs = match pod.key.name.as_str() {
            "web" => "nginx, and redis-cli INCR visits",
            "redis" => "redis-server",
            "report" => "redis-cli GET visits",
            _ => "curl http://web",
        };
        let (v4, v6) = (address(IpAddr::is_ipv4), address(IpAddr::is_ipv6));
        table.row([pod.key.to_string(), pod.node.clone(), identity, v4, v6, runs.to_owned()]);
    }
    stage.text(&table.render(None));
    let running = pods
        .iter()
        .filter(|pod| pod.complete && pod.programs(&lab).iter().all(|(_, process)| process.is_some()))
        .filter(|pod| pod.addresses.len() == 2)
        .count();
    let seen = match running {
        6 => Ok(format!("{:.1} s", took.as_secs_f64())),
        other => Err(format!("{other} of {} pods run", pods.len())),
    };
    stage.check("six pods run on both nodes, each with an IPv4 and an IPv6 address", seen);
    Ok(lab)
}

struct Play<'a> {
    stage: &'a Stage,
    lab: Lab,
    interrupt: &'a Interrupt,
    clients: Vec<Client>,
    servers: [Server; 2],
    web: PodRecord,
    redis: PodRecord,
    ui: PodRecord,
}

impl<'a> Play<'a> {
    fn new(stage: &'a Stage, lab: Lab, interrupt: &'a Interrupt) -> anyhow::Result<Self> {
        let pod = |name: &str| lab.pod(&name.parse().map_err(anyhow::Error::msg)?);
        let (web, redis, ui) = (pod("shop/web")?, pod("shop/redis")?, pod("front/ui")?);
        let mut clients = Vec::new();
        for name in ["front/app", "front/ui", "shop/web", "shop/report", "guest/scan"] {
            clients.push(Client { name: name.to_owned(), netns: pod(name)?.netns });
        }
        let world: PathBuf = netns::path(&lab.name.world_namespace());
        clients.push(Client { name: "world".to_owned(), netns: world });
        let servers = [
            Server { service: "web", addresses: web.addresses.clone() },
            Server { service: "redis", addresses: redis.addresses.clone() },
        ];
        // The pods' own programs wait for this file.
        let mut addresses = String::new();
        for (name, pod) in [("WEB", &web), ("REDIS", &redis)] {
            for address in &pod.addresses {
                addresses.push_str(&format!("{name}{}={address}\n", if address.is_ipv4() { 4 } else { 6 }));
            }
        }
        crate::files::write_atomic(&lab.name.directory().join("addresses"), addresses.as_bytes())?;
        Ok(Self { stage, lab, interrupt, clients, servers, web, redis, ui })
    }

    fn may_go_on(&self) -> Result<(), Interrupted> {
        if self.stage.gone() { Err(Interrupted) } else { self.interrupt.check() }
    }

    /// Act 2.
    fn everything_talks(&self) -> anyhow::Result<()> {
        self.stage.act(
            2,
            "Without a policy, everything talks",
            "A real curl and a real redis-cli from every pod, and from a host outside the cluster, in both families.",
        );
        let reached = traffic::everyone(&self.clients, &self.servers)?;
        self.may_go_on()?;
        self.stage.matrix(&reached);
        self.stage.check(
            &format!("all {} connections work", reached.len()),
            compare(&reached, |_, _| true).map(|()| String::new()),
        );
        Ok(())
    }

    /// Act 3. Answers when the policy was enforced, in nanoseconds since 1970.
    fn a_policy(&self) -> anyhow::Result<u64> {
        self.stage.act(
            3,
            "A NetworkPolicy",
            "default-deny     pods of the namespace shop accept nothing,\n\
             web-from-front   but web accepts its port http from namespaces with tier=front,\n\
             redis-from-web   and redis accepts its port redis from web.",
        );
        let policies = parse("policies.yaml", POLICIES)?;
        let put = policies.iter().map(|policy| (policy.store_key(), policy.to_json())).collect();
        let took = self.change(&Change { put, delete: Vec::new() })?;
        let since = now();
        let refused = cluster::refused_policies(&self.lab)?;
        let seen = if refused.is_empty() { Ok(in_ms(took)) } else { Err(refused.join("\n")) };
        self.stage.check("three policies written, and enforced on both nodes", seen);
        let reached = traffic::everyone(&self.clients, &self.servers)?;
        self.may_go_on()?;
        self.stage.matrix(&reached);
        let open = reached.iter().filter(|cell| allowed(&cell.from, cell.service)).count();
        self.stage.check(
            &format!("exactly what the policies allow: {open} connections pass, {} do not", reached.len() - open),
            compare(&reached, allowed).map(|()| String::new()),
        );
        let answers: anyhow::Result<Vec<Reach>> = reached.iter().map(|cell| self.predicted(cell)).collect();
        self.stage.check(
            &format!("`cirri policy explain` says the same of all {}", reached.len()),
            compare(&answers?, allowed).map(|()| String::new()),
        );
        Ok(since)
    }

    /// Act 4.
    fn the_flows(&self, since: u64) -> anyhow::Result<()> {
        self.stage.act(
            4,
            "The flows, and the rule behind each",
            "The packet path reports every verdict with the rule that decided; agents put names to it.",
        );
        let passed = [
            ("shop/web", self.web.node.as_str(), "front/ui", "shop/web-from-front"),
            ("shop/redis", self.redis.node.as_str(), "shop/web", "shop/redis-from-web"),
        ];
        for (to, node, from, policy) in passed {
            self.stage.command(node, &format!("cirri observe --from {from} --to {to} --last 1"));
            let flow = self.flow(node, since, ends(from, to, "forwarded"))?;
            let seen = match &flow {
                Some(flow) => {
                    self.stage
                        .text(&cirri_flow::compact_with(&Record::Flow(Box::new(flow.clone())), self.stage.colours()));
                    let rule = flow.ingress_rule.as_ref().and_then(|rule| rule.policy.as_deref());
                    if rule == Some(policy) { Ok(String::new()) } else { Err(format!("the rule is {rule:?}")) }
                }
                None => Err("no such flow".to_owned()),
            };
            self.stage.check(&format!("{from} may reach {to}, because of the policy {policy}"), seen);
        }
        self.stage.command(&self.redis.node, "cirri observe --from shop/report --verdict dropped --last 1");
        let flow = self.flow(&self.redis.node, since, ends("shop/report", "shop/redis", "dropped"))?;
        self.drop_seen(
            flow,
            "shop/report is dropped at redis: POLICY_DENIED (133), because no rule of the policies allows it",
        );
        self.stage.command(&self.redis.node, "cirri policy explain --from shop/report --to shop/redis --port 6379");
        let answer = self.explain(&self.redis.node, "shop/report", "shop/redis", 6379)?;
        for (name, direction) in [("Egress ", &answer.egress), ("Ingress", &answer.ingress)] {
            if let Some(direction) = direction {
                self.stage.text(&format!("{name} {}: {}", direction.verdict, direction.rule));
            }
        }
        let ingress = answer.ingress.as_ref().map(|ingress| ingress.rule.as_str()).unwrap_or_default();
        let named = ["shop/default-deny", "shop/redis-from-web"].iter().all(|policy| ingress.contains(policy));
        let seen = if answer.verdict == "deny" && named { Ok(String::new()) } else { Err(format!("{answer:?}")) };
        self.stage.check("the explanation names the policies that select redis", seen);
        Ok(())
    }

    /// Act 5, first part.
    fn in_the_middle(&self) -> anyhow::Result<()> {
        self.stage.act(
            5,
            "In the middle of things",
            "web holds a connection to redis open, ui one to web. The policy redis-from-web is removed, then put back.",
        );
        let redis = self.address(&self.redis, 6379, true)?;
        let web = self.address(&self.web, 80, false)?;
        let opened = Held::open(&self.web.netns, redis).and_then(|one| Ok((one, Held::open(&self.ui.netns, web)?)));
        let established = "both connections are established and answer";
        let (mut closing, mut other) = match opened {
            Ok(both) => both,
            Err(error) => {
                self.stage.check(established, Err(format!("{error:#}")));
                return Ok(());
            }
        };
        let before = closing.redis("PING", PATIENCE).map_err(|error| error.to_string());
        let page = other.get(PATIENCE).map_err(|error| error.to_string());
        self.stage.check(established, before.and(page).map(|()| String::new()));

        let key = "resources/NetworkPolicy/shop/redis-from-web".to_owned();
        let took = self.change(&Change { delete: vec![key.clone()], ..Change::default() })?;
        let since = now();
        let answer = closing.redis("PING", SILENCE);
        let seen = match answer {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(in_ms(took)),
            other => Err(format!("{other:?}")),
        };
        self.may_go_on()?;
        self.stage.check("the policy gone, the open connection to redis is silent from the next packet on", seen);
        let mut filter = ends("shop/web", "shop/redis", "dropped");
        filter.port = vec![closing.local.port()];
        let flow = self.flow(&self.redis.node, since, filter)?;
        self.drop_seen(flow, "its packet is a drop that names its reason like any other");
        let page = other.get(PATIENCE).map(|()| String::new()).map_err(|error| error.to_string());
        self.stage.check("the other connection, which that policy does not concern, goes on", page);

        let policies = parse("policies.yaml", POLICIES)?;
        let put = policies.iter().filter(|policy| policy.store_key() == key);
        let put = put.map(|policy| (policy.store_key(), policy.to_json())).collect();
        self.change(&Change { put, delete: Vec::new() })?;
        let begun = Instant::now();
        let answer = closing.line(PATIENCE);
        let seen = match answer {
            Ok(line) if line == "+PONG" => Ok(format!("after {}", in_ms(begun.elapsed()))),
            other => Err(format!("{other:?}")),
        };
        self.stage.check("the policy back, the same connection goes on with what it was sending", seen);
        Ok(())
    }

    /// Act 5, second part.
    fn without_agents(&self) -> anyhow::Result<()> {
        self.stage.line("");
        self.stage
            .text("Both agents are killed (kill -9) while ui fetches pages, each on a new connection, then started.");
        let web: Result<Vec<SocketAddr>, _> =
            [true, false].into_iter().map(|v4| self.address(&self.web, 80, v4)).collect();
        let web = web?;
        let kept = "a connection from before answers meanwhile";
        let mut held = match Held::open(&self.web.netns, self.address(&self.redis, 6379, false)?) {
            Ok(held) => held,
            Err(error) => {
                self.stage.check(kept, Err(format!("{error:#}")));
                return Ok(());
            }
        };
        let stop = AtomicBool::new(false);
        let (steady, outcome) = std::thread::scope(|scope| {
            let netns = &self.ui.netns;
            let stream = scope.spawn(|| traffic::steady(netns, &web, &stop));
            let outcome = self.kill_and_restart(&mut held);
            stop.store(true, Ordering::Relaxed);
            (stream.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), outcome)
        });
        let (steady, (away, answer)) = (steady?, outcome?);
        let failed: usize = steady.failed.values().sum();
        let detail = format!(
            "{} requests, the slowest {}, agents away for {}",
            steady.requests,
            in_ms(steady.slowest),
            in_ms(away)
        );
        let seen = if failed == 0 && steady.requests > 0 {
            Ok(detail)
        } else {
            let reasons: Vec<String> =
                steady.failed.iter().map(|(reason, count)| format!("{count} × {reason}")).collect();
            Err(format!("{failed} of {} requests failed\n{}", steady.requests, reasons.join("\n")))
        };
        self.stage.check("not one request fails while there is no agent, nor when it returns", seen);
        let seen = match answer {
            Ok(line) if line == "+PONG" => Ok(String::new()),
            other => Err(format!("{other:?}")),
        };
        self.stage.check(kept, seen);
        let reached = traffic::everyone(&self.clients, &self.servers)?;
        self.may_go_on()?;
        self.stage.check(
            &format!("after it, the same {} connections pass or do not, as before", reached.len()),
            compare(&reached, allowed).map(|()| String::new()),
        );
        Ok(())
    }

    /// How long there was no agent, and what the held connection answered meanwhile.
    fn kill_and_restart(&self, held: &mut Held) -> anyhow::Result<(Duration, std::io::Result<String>)> {
        std::thread::sleep(PAUSE);
        let agents: Vec<_> = self.lab.nodes.iter().filter_map(|node| self.lab.agent_process(&node.name)).collect();
        let begun = Instant::now();
        process::kill(&agents)?;
        std::thread::sleep(PAUSE);
        let answer = held.redis("PING", PATIENCE);
        let (lab, interrupt) = (&self.lab, self.interrupt);
        cluster::each_node(lab, |node| up::start_agent(lab, node, interrupt))?;
        let away = begun.elapsed();
        cluster::settle(lab, SETTLE, interrupt)?;
        std::thread::sleep(PAUSE);
        Ok((away, answer))
    }

    /// Changes the store; how long until every node enforced it.
    fn change(&self, change: &Change) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        cluster::change(&self.lab, change)?;
        cluster::settle_once(&self.lab, SETTLE, self.interrupt)?;
        Ok(begun.elapsed())
    }

    fn drop_seen(&self, flow: Option<Flow>, expected: &str) {
        let seen = match flow {
            None => Err("no such flow".to_owned()),
            Some(flow) => {
                let denied = flow.drop.as_ref().is_some_and(|drop| drop.name == "POLICY_DENIED" && drop.code == 133);
                let implicit = flow.deciding_rule().is_some_and(|rule| rule.kind == RuleKind::DefaultDeny);
                let expected = flow.verdict == Verdict::Dropped && denied && implicit;
                let record = Record::Flow(Box::new(flow));
                self.stage.text(&cirri_flow::compact_with(&record, self.stage.colours()));
                if expected { Ok(String::new()) } else { Err(cirri_flow::compact(&record)) }
            }
        };
        self.stage.check(expected, seen);
    }

    /// The first flow that matches and was seen at `since` or later; none if none comes in time.
    fn flow(&self, node: &str, since: u64, filter: Filter) -> anyhow::Result<Option<Flow>> {
        let question = Observe { follow: true, last: Some(usize::MAX >> 1), filter };
        let mut found = None;
        let outcome = client::stream(&self.lab.agent_socket(node), "observe", &question, Some(ANSWER), |value| {
            let record = serde_json::from_value(value).map_err(|error| CallError::Garbled(error.to_string()))?;
            if let Record::Flow(flow) = record
                && flow.time_ns >= since
            {
                found = Some(*flow);
                return Err(CallError::Stop(Error::new(Failure::Failed, "found")));
            }
            Ok(())
        });
        match outcome {
            Ok(()) | Err(CallError::Stop(_)) => {}
            Err(CallError::Busy(_)) => {}
            Err(error) => return Err(error).with_context(|| format!("the agent of {node}")),
        }
        self.may_go_on()?;
        Ok(found)
    }

    /// What `policy explain` says of a connection that was tried.
    fn predicted(&self, tried: &Reach) -> anyhow::Result<Reach> {
        let (pod, port) = if tried.service == "web" { (&self.web, 80) } else { (&self.redis, 6379) };
        let world = underlay::WORLD.into_iter().find(|address| address.is_ipv4() == (tried.family == 4));
        let from = match world {
            Some(world) if tried.from == "world" => world.to_string(),
            _ => tried.from.clone(),
        };
        let answer = self.explain(&pod.node, &from, &tried.address.to_string(), port)?;
        let outcome = match answer.verdict.as_str() {
            "allow" => Ok(()),
            _ => Err(format!("{answer:?}")),
        };
        Ok(Reach { outcome, ..tried.clone() })
    }

    fn explain(&self, node: &str, from: &str, to: &str, port: u16) -> anyhow::Result<Explanation> {
        let question = PolicyExplain { from: from.to_owned(), to: to.to_owned(), port, proto: "TCP".to_owned() };
        client::call(&self.lab.agent_socket(node), "policy.explain", &question, ANSWER)
            .with_context(|| format!("the agent of {node}"))
    }

    fn address(&self, pod: &PodRecord, port: u16, v4: bool) -> anyhow::Result<SocketAddr> {
        let address = pod.addresses.iter().find(|address| address.is_ipv4() == v4);
        Ok(SocketAddr::new(*address.with_context(|| format!("pod {} lacks an address", pod.key))?, port))
    }
}

/// What the policies say.
fn allowed(from: &str, service: &str) -> bool {
    match service {
        "web" => from.starts_with("front/"),
        _ => from == "shop/web",
    }
}

/// Whether every connection went as expected; if not, which ones did not.
fn compare(cells: &[Reach], expected: impl Fn(&str, &str) -> bool) -> Result<(), String> {
    let wrong: Vec<String> = cells
        .iter()
        .filter(|cell| cell.outcome.is_ok() != expected(&cell.from, cell.service))
        .map(|cell| {
            let what = cell.outcome.as_ref().err().map_or("it works", String::as_str);
            format!("{} → {} ({}): {what}", cell.from, cell.service, cell.address)
        })
        .collect();
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n")) }
}

fn ends(from: &str, to: &str, verdict: &str) -> Filter {
    let one = |text: &str| vec![text.to_owned()];
    Filter { from: one(from), to: one(to), verdict: one(verdict), ..Filter::default() }
}

fn parse(file: &str, text: &str) -> anyhow::Result<Vec<Resource>> {
    Ok(parse_documents(file, text)?)
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_nanos().try_into().unwrap_or(u64::MAX)
}

fn in_ms(time: Duration) -> String {
    format!("{:.0} ms", time.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manifests_hold_what_the_acts_speak_of() {
        let pods = parse("pods.yaml", PODS).unwrap();
        assert_eq!(pods.iter().filter(|resource| matches!(resource, Resource::Pod(_))).count(), 6);
        let keys: Vec<String> = parse("policies.yaml", POLICIES).unwrap().iter().map(Resource::store_key).collect();
        assert!(keys.contains(&"resources/NetworkPolicy/shop/redis-from-web".to_owned()), "{keys:?}");
        assert_eq!(keys.len(), 3);
    }

    #[test]
    fn a_connection_that_should_not_work_is_named() {
        let cell = |from: &str, outcome| Reach {
            from: from.into(),
            service: "redis",
            address: IpAddr::from([10, 0, 0, 1]),
            family: 4,
            outcome,
        };
        let cells = [cell("shop/web", Ok(())), cell("guest/scan", Ok(())), cell("front/ui", Err("silence".into()))];
        assert_eq!(compare(&cells, allowed).unwrap_err(), "guest/scan → redis (10.0.0.1): it works");
        assert_eq!(compare(&cells[..1], allowed), Ok(()));
    }
}
