//! `cirri identity`.

use crate::api::IdentityInfo;
use crate::client::ClientArgs;
use crate::exit::Result;
use crate::output::{self, OutputArgs, Table};

/// The identities of the cluster.
#[derive(Debug, clap::Args)]
pub struct IdentityArgs {
    #[command(subcommand)]
    command: IdentityCommand,
}

#[derive(Debug, clap::Subcommand)]
enum IdentityCommand {
    /// All of them: the number, and the labels it stands for
    List {
        #[command(flatten)]
        output: OutputArgs,
    },
}

/// Runs it.
pub fn run(client: &ClientArgs, args: &IdentityArgs) -> Result<()> {
    let IdentityCommand::List { output } = &args.command;
    let identities: Vec<IdentityInfo> = client.call("identity.list", serde_json::json!({}))?;
    output::print(output.output, &identities, |identities| {
        let mut table = Table::new(["id", "endpoints", "labels"]);
        for identity in identities {
            table.row([identity.id.to_string(), identity.endpoints.to_string(), identity.labels.join(",")]);
        }
        table.render(output::terminal_width())
    })
}
