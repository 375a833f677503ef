//! `cirri service`.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use crate::api::{BackendInfo, FrontendInfo, ServiceGet, ServiceInfo};
use crate::client::ClientArgs;
use crate::exit::{Error, Failure, Result};
use crate::output::{self, OutputArgs, Table};

/// Services: where they are reached, who serves them, what is wrong with them.
#[derive(Debug, clap::Args)]
pub struct ServiceArgs {
    #[command(subcommand)]
    command: ServiceCommand,
}

#[derive(Debug, clap::Subcommand)]
enum ServiceCommand {
    /// All of them, a line for each port and family
    List {
        /// Only of this namespace
        #[arg(short, long, value_name = "NAMESPACE")]
        namespace: Option<String>,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// One of them, with every backend, what it was given on this node, and what is wrong
    Get {
        /// NAMESPACE/SERVICE, or SERVICE of any namespace
        name: String,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Every backend of every service, or of one
    Backends {
        /// NAMESPACE/SERVICE, or SERVICE of any namespace
        name: Option<String>,
        #[command(flatten)]
        output: OutputArgs,
    },
}

/// Runs it.
pub fn run(client: &ClientArgs, args: &ServiceArgs) -> Result<()> {
    match &args.command {
        ServiceCommand::List { namespace, output } => {
            let wanted = ServiceGet { namespace: namespace.clone(), name: None };
            let services: Vec<ServiceInfo> = client.call("service.list", wanted)?;
            output::print(output.output, &services, |services| list(services))
        }
        ServiceCommand::Get { name, output } => {
            let services: Vec<ServiceInfo> = client.call("service.get", named(name))?;
            if services.is_empty() {
                return Err(no_service(name));
            }
            output::print(output.output, &services, |services| detailed(services))
        }
        ServiceCommand::Backends { name, output } => {
            let wanted = name.as_deref().map(named).unwrap_or_default();
            let backends: Vec<BackendInfo> = client.call("service.backends", wanted)?;
            output::print(output.output, &backends, |backends| backend_list(backends))
        }
    }
}

fn named(name: &str) -> ServiceGet {
    match name.split_once('/') {
        Some((namespace, name)) => ServiceGet { namespace: Some(namespace.to_owned()), name: Some(name.to_owned()) },
        None => ServiceGet { namespace: None, name: Some(name.to_owned()) },
    }
}

fn no_service(name: &str) -> Error {
    Error::new(Failure::Failed, format!("there is no service {name} here")).hint(
        "`cirri service list` shows all that have addresses; headless services, those of type ExternalName \
         and those with the label service.kubernetes.io/service-proxy-name have none",
    )
}

fn list(services: &[ServiceInfo]) -> String {
    let mut table =
        Table::new(["service", "type", "frontends", "backends", "algorithm", "forwarding", "affinity", "state"]);
    for service in services {
        table.row([
            name(service),
            service.kind.clone(),
            service.frontends.iter().map(address).collect::<Vec<_>>().join(","),
            format!("{}/{}", service.ready, service.total),
            service.algorithm.clone(),
            service.forwarding.clone(),
            affinity(service),
            service.state.clone(),
        ]);
    }
    let mut text = table.render(output::terminal_width());
    let problems: BTreeSet<String> = services
        .iter()
        .flat_map(|service| {
            service
                .problems
                .iter()
                .map(|problem| format!("WARNING {}/{}: {problem}\n", service.namespace, service.name))
        })
        .collect();
    text.extend(problems);
    text
}

fn detailed(services: &[ServiceInfo]) -> String {
    services.iter().map(one).collect::<Vec<_>>().join("\n")
}

fn one(service: &ServiceInfo) -> String {
    let frontends: Vec<String> =
        service.frontends.iter().map(|frontend| format!("{} {}", frontend.kind, address(frontend))).collect();
    let mut rows = vec![
        ("Service", format!("{} (number {})", name(service), service.id)),
        ("State", service.state.clone()),
        ("Frontends", frontends.join("\n            ")),
        ("Chosen", format!("{}, affinity {}", service.algorithm, affinity(service))),
        ("Forwarding", service.forwarding.clone()),
        (
            "Backends",
            format!(
                "{} of {} ready; {} for clients inside, {} for clients outside",
                service.ready, service.total, service.inside, service.outside
            ),
        ),
    ];
    if !service.source_ranges.is_empty() {
        let word = if service.source_ranges_deny { "not from" } else { "only from" };
        rows.push(("Clients", format!("{word} {}", service.source_ranges.join(", "))));
    }
    rows.extend(service.problems.iter().map(|problem| ("PROBLEM", problem.clone())));
    let mut text: String = rows.iter().map(|(name, value)| format!("{name:<12}{value}\n")).collect();
    if service.backends.is_empty() {
        return text;
    }
    text.push('\n');
    text.push_str(&backend_table(&service.backends).render(output::terminal_width()));
    text
}

fn backend_table(backends: &[BackendInfo]) -> Table {
    let headings =
        ["backend", "address", "state", "weight", "for", "node", "pod", "connections", "packets", "bytes", "answers"];
    let mut table = Table::new(headings);
    for backend in backends {
        table.row([
            backend.number.to_string(),
            SocketAddr::new(backend.ip, backend.port).to_string(),
            backend.state.clone(),
            backend.weight.to_string(),
            clients(backend).to_owned(),
            backend.node.clone().unwrap_or_else(|| "-".to_owned()),
            backend.pod.clone().unwrap_or_else(|| "-".to_owned()),
            backend.connections.to_string(),
            backend.packets.to_string(),
            backend.bytes.to_string(),
            backend.answers.to_string(),
        ]);
    }
    table
}

fn backend_list(backends: &[BackendInfo]) -> String {
    let mut table = Table::new(["service", "backend", "address", "state", "node", "connections", "packets", "answers"]);
    for backend in backends {
        table.row([
            backend.service.clone(),
            backend.number.to_string(),
            SocketAddr::new(backend.ip, backend.port).to_string(),
            backend.state.clone(),
            backend.node.clone().unwrap_or_else(|| "-".to_owned()),
            backend.connections.to_string(),
            backend.packets.to_string(),
            backend.answers.to_string(),
        ]);
    }
    table.render(output::terminal_width())
}

/// Which clients may be given it.
fn clients(backend: &BackendInfo) -> &'static str {
    match (backend.inside, backend.outside) {
        (true, true) => "all",
        (true, false) => "inside",
        (false, true) => "outside",
        (false, false) => "-",
    }
}

fn name(service: &ServiceInfo) -> String {
    let family = if service.ip_version == 6 { " (IPv6)" } else { "" };
    format!("{}/{}:{}/{}{family}", service.namespace, service.name, service.port, service.protocol)
}

fn address(frontend: &FrontendInfo) -> String {
    match frontend.ip {
        Some(IpAddr::V4(ip)) => format!("{ip}:{}", frontend.port),
        Some(IpAddr::V6(ip)) => format!("[{ip}]:{}", frontend.port),
        None => format!("*:{}", frontend.port),
    }
}

fn affinity(service: &ServiceInfo) -> String {
    if service.affinity_s == 0 { "-".to_owned() } else { format!("{} s", service.affinity_s) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service() -> ServiceInfo {
        serde_json::from_value(serde_json::json!({
            "namespace": "shop", "name": "web", "port": "http", "protocol": "TCP", "ip_version": 4,
            "state": "enforced", "id": 1, "type": "NodePort",
            "frontends": [{"kind": "ClusterIP", "ip": "10.96.0.1", "port": 80}, {"kind": "NodePort", "port": 30080}],
            "ready": 1, "total": 2, "inside": 1, "outside": 0, "algorithm": "random", "forwarding": "snat",
            "affinity_s": 0, "source_ranges": ["192.0.2.0/24"], "problems": ["something"],
            "backends": [{
                "service": "shop/web:http/TCP", "number": 7, "ip": "10.244.0.5", "port": 8080, "state": "draining",
                "weight": 1, "node": "a", "inside": true, "outside": false,
                "connections": 3, "packets": 20, "bytes": 900, "answers": 18
            }]
        }))
        .unwrap()
    }

    #[test]
    fn a_list_has_a_line_for_each_port() {
        let text = list(&[service()]);
        assert!(text.contains("\nWARNING shop/web: something\n"), "{text}");
        assert!(
            text.lines().nth(1).unwrap().starts_with("shop/web:http/TCP  NodePort  10.96.0.1:80,*:30080  1/2  "),
            "{text}"
        );
    }

    #[test]
    fn one_service_shows_every_backend_and_what_is_wrong() {
        let text = one(&service());
        for want in ["PROBLEM     something", "only from 192.0.2.0/24", "10.244.0.5:8080  draining  1       inside"] {
            assert!(text.contains(want), "{want} in {text}");
        }
    }

    #[test]
    fn a_name_may_have_a_namespace() {
        assert_eq!(named("shop/web").namespace.as_deref(), Some("shop"));
        assert_eq!((named("web").namespace, named("web").name.as_deref()), (None, Some("web")));
    }
}
