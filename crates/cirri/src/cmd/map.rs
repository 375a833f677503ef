//! `cirri map`.

use crate::api::{MapDump, MapEntry, MapInfo};
use crate::client::ClientArgs;
use crate::exit::Result;
use crate::output::{self, OutputArgs, Table};

/// The packet path's maps.
#[derive(Debug, clap::Args)]
pub struct MapArgs {
    #[command(subcommand)]
    command: MapCommand,
}

#[derive(Debug, clap::Subcommand)]
enum MapCommand {
    /// All of them: what they are for, how full they are
    List {
        #[command(flatten)]
        output: OutputArgs,
    },
    /// The entries of one, in words
    Dump {
        /// Its name, as `cirri map list` shows it
        name: String,
        /// At most so many entries; 0 for all
        #[arg(long, default_value_t = 1000)]
        limit: usize,
        #[command(flatten)]
        output: OutputArgs,
    },
}

/// Runs it.
pub fn run(client: &ClientArgs, args: &MapArgs) -> Result<()> {
    match &args.command {
        MapCommand::List { output } => {
            let maps: Vec<MapInfo> = client.call("map.list", serde_json::json!({}))?;
            output::print(output.output, &maps, |maps| list(maps))
        }
        MapCommand::Dump { name, limit, output } => {
            let dump = MapDump { name: name.clone(), limit: *limit };
            let entries: Vec<MapEntry> = client.call("map.dump", dump)?;
            output::print(output.output, &entries, |entries| dumped(entries))
        }
    }
}

fn list(maps: &[MapInfo]) -> String {
    let mut table = Table::new(["name", "kind", "entries", "max", "key", "value", "memory", "about"]);
    for map in maps {
        table.row([
            map.name.clone(),
            map.kind.clone(),
            map.entries.map_or_else(|| "-".to_owned(), |entries| entries.to_string()),
            map.max_entries.to_string(),
            map.key_size.to_string(),
            map.value_size.to_string(),
            format!("{} KiB", map.memory_bytes.div_ceil(1024)),
            map.about.clone(),
        ]);
    }
    table.render(output::terminal_width())
}

fn dumped(entries: &[MapEntry]) -> String {
    let mut table = Table::new(["key", "value"]);
    for entry in entries {
        table.row([entry.key.clone(), entry.value.clone()]);
    }
    table.render(output::terminal_width())
}
