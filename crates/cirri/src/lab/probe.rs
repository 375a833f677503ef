//! `cirri lab probe`: who reaches whom, found out by trying.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::Serialize;

use super::ask::{self, Asker};
use super::echo::{Port, Transport};
use super::prober::{Job, Outcome, Patience, SocketKind, Verdict};
use super::service::{self, Vip};
use super::state::{DEFAULT_NAME, Lab, LabName, PodKey, PodRecord};
use super::up::WORLD_PORTS;
use super::{EXIT_DENIED, cgroup, matrix, netns, underlay};
use crate::output::{self, OutputArgs};

/// Arguments of `cirri lab probe`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  cirri lab probe --from shop/client --to shop/db --port 5432
  cirri lab probe --from shop/client --to 198.51.100.10 --proto icmp
  cirri lab probe --from world --to shop/web --port 80 --family 6
  cirri lab probe --from shop/client --to svc:shop/web --port http -n 20
  cirri lab probe --from world --to svc:shop/web --vip node:node2
  cirri lab probe --all-pairs
  cirri lab probe --all-pairs --ports 80/tcp,53/udp --with-world -o json

A probe is allowed when an answer comes back, denied when there is silence, refused when somebody says at once that
nobody serves this (a TCP reset, ICMP \"port unreachable\"), an error otherwise (no route, a broken connection). Exit code of a single probe: 0 if every family got through, 4 if not. --all-pairs exits 0 whatever it finds.")]
pub struct ProbeArgs {
    /// The lab.
    #[arg(long, default_value = DEFAULT_NAME)]
    name: LabName,
    /// From where: NAMESPACE/POD, node:NAME, world, or world@ADDRESS for another address of the outside host.
    #[arg(long, required_unless_present = "all_pairs", conflicts_with = "all_pairs")]
    from: Option<End>,
    /// Where to: NAMESPACE/POD, svc:NAMESPACE/SERVICE, node:NAME, world or an IP address.
    #[arg(long, required_unless_present = "all_pairs", conflicts_with = "all_pairs")]
    to: Option<End>,
    /// The port (not for icmp); for a service also its name, or nothing if it has only one.
    #[arg(long, conflicts_with = "all_pairs")]
    port: Option<String>,
    /// Which address of a service: cluster, node:NAME, loopback (both: its node port), lb or external.
    #[arg(long, default_value = "cluster", conflicts_with = "all_pairs")]
    vip: Vip,
    /// How often, one after the other.
    #[arg(short = 'n', long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    count: u32,
    /// The kind of socket: plain, mapped (IPv6 with IPv4-mapped addresses) or unconnected (for udp).
    #[arg(long, value_enum, default_value = "plain", hide_possible_values = true)]
    kind: SocketKind,
    /// The protocol.
    #[arg(long, value_enum, default_value = "tcp", conflicts_with = "all_pairs")]
    proto: Transport,
    /// The address families to try.
    #[arg(long, value_enum, default_value = "both")]
    family: Family,
    /// How long one try waits, in milliseconds; one over tcp for the handshake, and then for data.
    #[arg(long, default_value_t = 700, value_name = "MS", value_parser = crate::span::milliseconds())]
    timeout: u64,
    /// How often silence is tried again.
    #[arg(long, default_value_t = 1)]
    retries: u32,
    /// From every pod to every pod.
    #[arg(long)]
    all_pairs: bool,
    /// The ports of --all-pairs, as 80/tcp,53/udp,icmp; each pod's own ports if absent.
    #[arg(long, value_delimiter = ',', requires = "all_pairs")]
    ports: Vec<Port>,
    /// With --all-pairs: the outside host too, in both roles.
    #[arg(long, requires = "all_pairs")]
    with_world: bool,
    /// With --all-pairs: the nodes too, as sources.
    #[arg(long, requires = "all_pairs")]
    with_nodes: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Family {
    #[value(name = "4")]
    V4,
    #[value(name = "6")]
    V6,
    Both,
}

impl Family {
    fn has(self, address: IpAddr) -> bool {
        match self {
            Self::V4 => address.is_ipv4(),
            Self::V6 => address.is_ipv6(),
            Self::Both => true,
        }
    }
}

/// One end of a probe as the user names it.
#[derive(Clone, Debug)]
enum End {
    Pod(PodKey),
    Service(PodKey),
    Node(String),
    World(Option<IpAddr>),
    Address(IpAddr),
}

impl FromStr for End {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "world" {
            return Ok(Self::World(None));
        }
        if let Some(address) = text.strip_prefix("world@") {
            return address
                .parse()
                .map(|address| Self::World(Some(address)))
                .map_err(|_| format!("\"{address}\" is not an address: write world@198.51.100.20"));
        }
        if let Some(service) = text.strip_prefix("svc:") {
            return service
                .parse()
                .map(Self::Service)
                .map_err(|_| format!("\"{service}\" is not a service: write svc:NAMESPACE/SERVICE"));
        }
        if let Some(node) = text.strip_prefix("node:") {
            return Ok(Self::Node(node.to_owned()));
        }
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        text.parse().map(Self::Pod)
    }
}

/// One answer, the unit of `-o json`.
#[derive(Clone, Debug, Serialize)]
pub struct Cell {
    /// The source, as `namespace/pod`, `node:name` or `world`.
    pub source: String,
    /// The destination, likewise, `svc:namespace/name` or an address.
    pub destination: String,
    /// The address that was tried.
    pub address: IpAddr,
    /// The port; absent for ICMP.
    pub port: Option<u16>,
    /// The protocol.
    pub protocol: Transport,
    /// 4 or 6.
    pub family: u8,
    /// What came of it: of the last try that was not allowed, else of the last.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// How often it was tried.
    pub tries: u32,
    /// Who answered, and how often.
    pub answers: Vec<Answered>,
}

/// Answers of one pod to one client.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Answered {
    /// The pod, as its server says.
    pub by: String,
    /// The client's address that it saw.
    pub client: IpAddr,
    /// How often.
    pub count: u32,
}

/// A party that can ask or be asked.
#[derive(Clone, Debug)]
struct Party {
    name: String,
    /// Where it asks from, namespace and control group; absent for what can only be asked.
    place: Option<(PathBuf, PathBuf)>,
    addresses: Vec<IpAddr>,
    /// The ports it declares.
    ports: BTreeSet<Port>,
    /// Those of them that the echo server answers on.
    echo: BTreeSet<Port>,
    /// The address it asks from, if that was chosen.
    source: Option<IpAddr>,
}

/// Probes as asked and prints the result.
///
/// # Errors
/// No such lab, pod or node; a source whose namespace cannot be entered.
pub fn run(args: ProbeArgs) -> anyhow::Result<ExitCode> {
    let lab = Lab::load(&args.name)?;
    let patience = Patience { timeout: Duration::from_millis(args.timeout), retries: args.retries, count: args.count };
    if args.kind == SocketKind::Unconnected && (args.all_pairs || args.proto != Transport::Udp) {
        bail!("--kind unconnected is for --proto udp");
    }
    let (sources, targets, ports) = if args.all_pairs {
        let (sources, targets) = everyone(&lab, &args)?;
        (sources, targets, args.ports.clone())
    } else {
        // Both are there: clap asks for them unless --all-pairs is given.
        let (from, to) =
            (args.from.as_ref().context("--from is missing")?, args.to.as_ref().context("--to is missing")?);
        if matches!(from, End::Address(_) | End::Service(_)) {
            bail!("--from: this can only be asked; name a pod, node:NAME, world or world@ADDRESS");
        }
        let (target, port) = match to {
            End::Service(key) => asked_service(&lab, key, &args)?,
            _ if args.vip != Vip::Cluster => bail!("--vip is for services: --to svc:NAMESPACE/NAME"),
            _ => (party(&lab, to)?, asked_port(&args)?),
        };
        (vec![party(&lab, from)?], vec![target], vec![port])
    };
    let questions = questions(&sources, &targets, &ports, &args);
    if questions.is_empty() {
        bail!("nothing to probe: no pod has ports or addresses for this (give --ports, see `cirri lab list`)");
    }
    let cells = ask(questions, patience)?;
    output::print(args.output.output, &cells, |cells| {
        if args.all_pairs { matrix::render(cells) } else { matrix::lines(cells) }
    })?;
    let through = cells.iter().all(|cell| cell.outcome.verdict == Verdict::Allowed);
    Ok(if args.all_pairs || through { ExitCode::SUCCESS } else { ExitCode::from(EXIT_DENIED) })
}

fn asked_port(args: &ProbeArgs) -> anyhow::Result<Port> {
    match (args.proto, args.port.as_deref().map(str::parse)) {
        (Transport::Icmp, None) => Ok(Port { number: 0, protocol: Transport::Icmp }),
        (Transport::Icmp, Some(_)) => bail!("icmp has no ports: leave --port out"),
        (_, None | Some(Err(_) | Ok(0))) => bail!("which port? Give --port NUMBER"),
        (protocol, Some(Ok(number))) => Ok(Port { number, protocol }),
    }
}

fn asked_service(lab: &Lab, key: &PodKey, args: &ProbeArgs) -> anyhow::Result<(Party, Port)> {
    if args.proto == Transport::Icmp {
        bail!("a service has ports, and icmp has none: choose --proto tcp or udp");
    }
    let target = service::target(lab, key, &args.vip, args.port.as_deref(), args.proto)?;
    let echo = target.echo.then_some(target.port).into_iter().collect();
    Ok((Party { echo, ..Party::silent(format!("svc:{key}"), target.addresses) }, target.port))
}

fn everyone(lab: &Lab, args: &ProbeArgs) -> anyhow::Result<(Vec<Party>, Vec<Party>)> {
    let pods = lab.pods()?;
    if pods.is_empty() {
        bail!("the lab \"{0}\" has no pods: put some in with `cirri lab apply --name {0} -f DIR --wait`", lab.name);
    }
    let mut targets: Vec<Party> = pods.iter().map(|pod| Party::pod(lab, pod)).collect::<anyhow::Result<_>>()?;
    if args.with_world {
        targets.push(party(lab, &End::World(None))?);
    }
    let mut sources = targets.clone();
    if args.with_nodes {
        for node in &lab.nodes {
            sources.push(party(lab, &End::Node(node.name.clone()))?);
        }
    }
    Ok((sources, targets))
}

fn party(lab: &Lab, end: &End) -> anyhow::Result<Party> {
    match end {
        End::Pod(key) => Party::pod(lab, &lab.pod(key)?),
        End::Service(key) => bail!("svc:{key} can only be asked"),
        End::Node(name) => {
            let node = lab.node(name)?;
            let addresses = vec![node.ipv4.into(), node.ipv6.into()];
            let place = Some((node.netns.clone(), cgroup::of(&lab.name, name)?));
            Ok(Party { place, ..Party::silent(format!("node:{name}"), addresses) })
        }
        End::World(source) => {
            if let Some(source) = source.filter(|source| !underlay::WORLD.contains(source)) {
                let all: Vec<String> = underlay::WORLD.iter().map(IpAddr::to_string).collect();
                bail!("the outside host has no address {source}; it has {}", all.join(", "));
            }
            let name = source.map_or("world".to_owned(), |source| format!("world@{source}"));
            let addresses = source.map_or(underlay::WORLD[..2].to_vec(), |source| vec![source]);
            let place = Some((netns::path(&lab.name.world_namespace()), cgroup::of(&lab.name, "world")?));
            // It answers on more; a matrix that asks for nothing in particular needs one of each protocol.
            let ports = WORLD_PORTS.into_iter().filter(|port| matches!(port.number, 53 | 80)).collect();
            let echo = WORLD_PORTS.into_iter().collect();
            Ok(Party { place, echo, ports, source: *source, ..Party::silent(name, addresses) })
        }
        End::Address(address) => Ok(Party::silent(address.to_string(), vec![*address])),
    }
}

impl Party {
    fn silent(name: String, addresses: Vec<IpAddr>) -> Self {
        Self { name, place: None, addresses, ports: BTreeSet::new(), echo: BTreeSet::new(), source: None }
    }

    fn pod(lab: &Lab, pod: &PodRecord) -> anyhow::Result<Self> {
        let ports = |echo_only: bool| {
            pod.spec
                .containers
                .iter()
                .filter(move |container| !echo_only || container.is_echo())
                .flat_map(|container| container.ports.iter().copied())
                .collect()
        };
        // Of the node: what holds for it holds for its pods.
        let group = cgroup::of(&lab.name, &pod.node)?;
        Ok(Self {
            place: Some((pod.netns.clone(), group)),
            ports: ports(false),
            echo: ports(true),
            ..Self::silent(pod.key.to_string(), pod.addresses.clone())
        })
    }
}

/// What one source asks, and for each job the names of its ends.
struct Questions {
    group: PathBuf,
    asker: Asker,
    ends: Vec<(String, String)>,
}

/// All questions, by source.
fn questions(sources: &[Party], targets: &[Party], ports: &[Port], args: &ProbeArgs) -> Vec<Questions> {
    let mut all = Vec::new();
    for source in sources {
        let Some((netns, group)) = source.place.clone() else { continue };
        let (mut jobs, mut ends) = (Vec::new(), Vec::new());
        for target in targets {
            let own: Vec<Port> = target.ports.iter().copied().collect();
            for port in if ports.is_empty() { &own } else { ports } {
                for address in target.addresses.iter().filter(|address| args.family.has(**address)) {
                    if source.source.is_some_and(|source| source.is_ipv4() != address.is_ipv4()) {
                        continue;
                    }
                    jobs.push(Job {
                        to: *address,
                        port: *port,
                        source: source.source,
                        echo: target.echo.contains(port),
                        socket: args.kind,
                    });
                    ends.push((source.name.clone(), target.name.clone()));
                }
            }
        }
        if !jobs.is_empty() {
            all.push(Questions { group, asker: Asker { netns, jobs }, ends });
        }
    }
    all
}

/// Asks all questions, each source on a thread in its own namespace, each control group by a process of its own.
fn ask(questions: Vec<Questions>, patience: Patience) -> anyhow::Result<Vec<Cell>> {
    let mut groups: BTreeMap<PathBuf, Vec<(usize, Asker)>> = BTreeMap::new();
    for (index, question) in questions.iter().enumerate() {
        groups.entry(question.group.clone()).or_default().push((index, question.asker.clone()));
    }
    let (mut order, mut asked) = (Vec::new(), Vec::new());
    for (group, askers) in groups {
        let (indices, askers): (Vec<usize>, Vec<Asker>) = askers.into_iter().unzip();
        order.extend(indices);
        asked.push((group, askers));
    }
    let answers = ask::ask(asked, patience)?.into_iter().flatten();
    let mut answers: Vec<(usize, Vec<Vec<Outcome>>)> = order.into_iter().zip(answers).collect();
    answers.sort_by_key(|(index, _)| *index);
    let mut cells = Vec::new();
    for (question, (_, outcomes)) in questions.into_iter().zip(answers) {
        let jobs = question.asker.jobs.iter().zip(question.ends).zip(outcomes);
        cells.extend(jobs.filter_map(|((job, ends), outcomes)| Cell::of(job, ends, &outcomes)));
    }
    Ok(cells)
}

impl Cell {
    /// `None` without a single try.
    fn of(job: &Job, (source, destination): (String, String), outcomes: &[Outcome]) -> Option<Self> {
        let failed = outcomes.iter().rev().find(|outcome| outcome.verdict != Verdict::Allowed);
        let mut answers: BTreeMap<(&str, IpAddr), u32> = BTreeMap::new();
        for outcome in outcomes {
            if let (Some(by), Some(client)) = (&outcome.answered_by, outcome.seen_client) {
                *answers.entry((by, client)).or_default() += 1;
            }
        }
        let answers = answers.into_iter().map(|((by, client), count)| Answered { by: by.to_owned(), client, count });
        Some(Self {
            source,
            destination,
            address: job.to,
            port: (job.port.protocol != Transport::Icmp).then_some(job.port.number),
            protocol: job.port.protocol,
            family: if job.to.is_ipv4() { 4 } else { 6 },
            outcome: failed.or(outcomes.last())?.clone(),
            tries: u32::try_from(outcomes.len()).unwrap_or(u32::MAX),
            answers: answers.collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_told_apart() {
        assert!(matches!("world".parse(), Ok(End::World(None))));
        assert!(matches!("world@198.51.100.20".parse(), Ok(End::World(Some(_)))));
        assert!(matches!("node:node1".parse(), Ok(End::Node(_))));
        assert!(matches!("fd00::1".parse(), Ok(End::Address(_))));
        assert!(matches!("shop/web".parse(), Ok(End::Pod(_))));
        assert!(matches!("svc:shop/web".parse(), Ok(End::Service(_))));
        assert!("world@here".parse::<End>().is_err());
    }

    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        args: ProbeArgs,
    }

    fn arguments(family: &str) -> ProbeArgs {
        <Command as clap::Parser>::parse_from(["probe", "--all-pairs", "--family", family]).args
    }

    #[test]
    fn every_port_is_asked_in_each_family_unless_the_source_has_only_one() {
        let addresses: Vec<IpAddr> = vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        let port: Port = "80/tcp".parse().unwrap();
        let target = Party {
            place: Some(("/run/netns/x".into(), "/group".into())),
            ports: [port].into(),
            echo: [port].into(),
            ..Party::silent("a/b".into(), addresses)
        };
        let count = |source: &Party, ports: &[Port], family| -> usize {
            questions(std::slice::from_ref(source), std::slice::from_ref(&target), ports, &arguments(family))
                .iter()
                .map(|asked| asked.asker.jobs.len())
                .sum()
        };
        assert_eq!(count(&target, &[], "both"), 2);
        assert_eq!(count(&target, &[port, "53/udp".parse().unwrap()], "6"), 2);
        let bound = Party { source: Some("198.51.100.20".parse().unwrap()), ..target.clone() };
        assert_eq!(count(&bound, &[], "both"), 1);
    }

    #[test]
    fn a_cell_tells_who_answered_how_often_and_what_failed() {
        let job = Job {
            to: "10.96.0.1".parse().unwrap(),
            port: "80/tcp".parse().unwrap(),
            source: None,
            echo: true,
            socket: SocketKind::Plain,
        };
        let answered = |pod: &str| Outcome {
            verdict: Verdict::Allowed,
            error: None,
            time_ms: 1.0,
            answered_by: Some(pod.into()),
            seen_client: Some("10.0.0.1".parse().unwrap()),
        };
        let refused = Outcome { verdict: Verdict::Refused, answered_by: None, seen_client: None, ..answered("") };
        let outcomes = [answered("a/b"), refused, answered("a/b"), answered("a/c")];
        let cell = Cell::of(&job, ("x".into(), "y".into()), &outcomes).unwrap();
        assert_eq!((cell.outcome.verdict, cell.tries), (Verdict::Refused, 4));
        let counts: Vec<(&str, u32)> = cell.answers.iter().map(|answer| (answer.by.as_str(), answer.count)).collect();
        assert_eq!(counts, [("a/b", 2), ("a/c", 1)]);
    }
}
