//! `cirri policy`.

use std::path::{Path, PathBuf};

use cirri_control::resource::{self, Resource};
use cirri_store::folder::read_bounded;
use serde::Serialize;

use crate::api::{ExplainedDirection, Explanation, PolicyExplain, PolicyGet, PolicyInfo};
use crate::client::ClientArgs;
use crate::exit::{Because, Error, Failure, Result};
use crate::output::{self, OutputArgs, Table};

/// Policies: what is enforced, why a connection passes or not, and checking a file.
#[derive(Debug, clap::Args)]
pub struct PolicyArgs {
    #[command(subcommand)]
    command: PolicyCommand,
}

#[derive(Debug, clap::Subcommand)]
enum PolicyCommand {
    /// The policies, whether they are enforced, and their rules
    Get {
        /// Only of this namespace
        #[arg(short, long)]
        namespace: Option<String>,
        /// Only of this name
        name: Option<String>,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Whether a new connection would pass, and which rule says so; exits 4 if it would not
    #[command(long_about = EXPLAIN)]
    Explain {
        /// The sender: NAMESPACE/POD or an address
        #[arg(long, value_name = "POD|ADDRESS")]
        from: String,
        /// The receiver: NAMESPACE/POD or an address
        #[arg(long, value_name = "POD|ADDRESS")]
        to: String,
        /// Destination port
        #[arg(long)]
        port: u16,
        /// tcp, udp or sctp
        #[arg(long, default_value = "tcp")]
        proto: String,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Read manifests as the agent would and say what is wrong; no agent is asked. Exits 2 on a mistake
    Check {
        /// Files to read; `-` for standard input
        #[arg(required = true)]
        files: Vec<PathBuf>,
        #[command(flatten)]
        output: OutputArgs,
    },
}

const EXPLAIN: &str = "\
Whether a new connection would pass, and which rule says so; exits 4 if it would not.

Both directions are asked as the packet path asks them: leaving the sender, then entering the
receiver. Traffic between a workload and its own node always passes.

  cirri policy explain --from shop/client --to shop/web --port 80
  cirri policy explain --from 192.0.2.7 --to shop/web --port 443 -o json";

/// Runs it.
pub fn run(client: &ClientArgs, args: &PolicyArgs) -> Result<()> {
    match &args.command {
        PolicyCommand::Get { namespace, name, output } => {
            let wanted = PolicyGet { namespace: namespace.clone(), name: name.clone() };
            let policies: Vec<PolicyInfo> = client.call("policy.get", wanted)?;
            output::print(output.output, &policies, |policies| list(policies))
        }
        PolicyCommand::Explain { from, to, port, proto, output } => {
            let question = PolicyExplain { from: from.clone(), to: to.clone(), port: *port, proto: proto.clone() };
            let answer: Explanation = client.call("policy.explain", question)?;
            output::print(output.output, &answer, explained)?;
            match answer.verdict.as_str() {
                "allow" => Ok(()),
                _ => Err(Error::new(Failure::Denied, "the connection would be denied")),
            }
        }
        PolicyCommand::Check { files, output } => check(files, output),
    }
}

fn list(policies: &[PolicyInfo]) -> String {
    let mut table = Table::new(["namespace", "name", "state", "endpoints", "direction", "rule", "allows"]);
    for policy in policies {
        let head = [policy.namespace.clone(), policy.name.clone(), policy.state.clone(), policy.endpoints.to_string()];
        let blank = || [const { String::new() }; 4];
        let mut head = Some(head);
        for rule in &policy.rules {
            let [namespace, name, state, endpoints] = head.take().unwrap_or_else(blank);
            let (direction, text) = (rule.direction.clone(), rule.text.clone());
            table.row([namespace, name, state, endpoints, direction, rule.index.to_string(), text]);
        }
        if let Some([namespace, name, state, endpoints]) = head {
            table.row([namespace, name, state, endpoints, "-".into(), "-".into(), "nothing".into()]);
        }
    }
    table.render(output::terminal_width())
}

fn explained(answer: &Explanation) -> String {
    let mut out = format!("{}\n\n", answer.verdict.to_uppercase());
    for (name, party) in [("From", &answer.from), ("To", &answer.to)] {
        out.push_str(&format!("{name:<9}{} (identity {}) {}\n", party.name, party.identity, party.labels.join(",")));
    }
    let mut direction = |name: &str, answer: &Option<ExplainedDirection>, outside: &str| match answer {
        Some(answer) => out.push_str(&format!("{name:<9}{}: {}\n", answer.verdict, answer.rule)),
        None => out.push_str(&format!("{name:<9}not asked: {outside}\n")),
    };
    direction("Egress", &answer.egress, "the sender is no workload of the cluster");
    direction("Ingress", &answer.ingress, "the receiver is no workload of the cluster");
    out
}

/// What a file holds.
#[derive(Debug, Serialize)]
struct Checked {
    file: String,
    kind: String,
    namespace: Option<String>,
    name: String,
}

fn check(files: &[PathBuf], output: &OutputArgs) -> Result<()> {
    let mut checked = Vec::new();
    let mut mistakes = Vec::new();
    for path in files {
        let file = path.display().to_string();
        let documents = match read(path) {
            Ok(bytes) => resource::read_documents(&file, &bytes),
            Err(error) => {
                mistakes.push(error.to_string());
                continue;
            }
        };
        checked.extend(documents.resources.iter().map(|resource| describe(&file, resource)));
        mistakes.extend(documents.errors.iter().map(ToString::to_string));
        if documents.more_errors > 0 {
            mistakes.push(format!("{file}: {} more errors are not shown", documents.more_errors));
        }
    }
    output::print(output.output, &checked, |checked| {
        let mut table = Table::new(["file", "kind", "namespace", "name"]);
        for one in checked {
            let namespace = one.namespace.clone().unwrap_or_else(|| "-".to_owned());
            table.row([one.file.clone(), one.kind.clone(), namespace, one.name.clone()]);
        }
        table.render(output::terminal_width())
    })?;
    if mistakes.is_empty() { Ok(()) } else { Err(Error::new(Failure::BadInput, mistakes.join("\n"))) }
}

fn describe(file: &str, resource: &Resource) -> Checked {
    Checked {
        file: file.to_owned(),
        kind: resource.kind().to_owned(),
        namespace: resource.namespace().map(str::to_owned),
        name: resource.name().to_owned(),
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let content = match path == Path::new("-") {
        true => read_bounded(std::io::stdin()),
        false => std::fs::File::open(path).and_then(read_bounded),
    };
    content.map_err(|error| format!("cannot read {}: {error}", path.display())).because(Failure::BadInput)
}
