//! Tables, JSON and YAML for every command that prints something.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use crate::exit::{Because, Error, Failure, Result};

/// How a command prints its answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Columns for people; fits the terminal.
    #[default]
    Table,
    /// JSON; stable fields.
    Json,
    /// YAML; the same fields.
    Yaml,
}

/// The option that every printing command has.
#[derive(Clone, Debug, clap::Args)]
pub struct OutputArgs {
    /// How to print the answer.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Format,
}

/// Columns for people: fits the terminal's width, plain when piped.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// With these headings.
    pub fn new<const N: usize>(headings: [&str; N]) -> Table {
        Table { rows: vec![headings.iter().map(|heading| heading.to_uppercase()).collect()] }
    }

    /// Adds a line.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }

    /// The lines, none of them wider than `width` (characters) if one is given. The widest column
    /// gives way first.
    pub fn render(&self, width: Option<usize>) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let mut widths = vec![0; columns];
        for row in &self.rows {
            for (column, cell) in row.iter().enumerate() {
                widths[column] = widths[column].max(cell.chars().count());
            }
        }
        if let Some(width) = width {
            shrink(&mut widths, width.saturating_sub(GAP * columns.saturating_sub(1)));
        }
        let mut out = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let room = widths[column];
                let text = cut(cell, room);
                line.push_str(&text);
                if column + 1 < row.len() {
                    line.extend(std::iter::repeat_n(' ', room - text.chars().count() + GAP));
                }
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

const GAP: usize = 2;
const NARROWEST: usize = 8;

fn shrink(widths: &mut [usize], room: usize) {
    while widths.iter().sum::<usize>() > room {
        match widths.iter_mut().max() {
            Some(widest) if *widest > NARROWEST => *widest -= 1,
            _ => return,
        }
    }
}

fn cut(text: &str, room: usize) -> String {
    if text.chars().count() <= room {
        return text.to_owned();
    }
    text.chars().take(room.saturating_sub(1)).chain(['…']).collect()
}

/// Prints an answer; `table` is asked only if a table is wanted.
pub fn print<T: Serialize>(format: Format, value: &T, table: impl FnOnce(&T) -> String) -> Result<()> {
    let text = match format {
        Format::Table => table(value),
        Format::Json => serde_json::to_string_pretty(value).because(Failure::Failed)? + "\n",
        Format::Yaml => serde_saphyr::to_string(value).because(Failure::Failed)?,
    };
    write_out(&text)
}

/// Writes to standard output. A reader that went away (`| head`) is no failure.
pub fn write_out(text: &str) -> Result<()> {
    write_bytes(text.as_bytes())
}

/// The same for what may be no text, such as a log.
pub fn write_bytes(bytes: &[u8]) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => Err(Error::new(Failure::Failed, format!("cannot write to standard output: {error}"))),
        Ok(()) => Ok(()),
    }
}

/// Prints a line about what was done. That nobody reads it any more is no reason to stop half-way.
pub fn progress(line: &str) {
    let _ = writeln!(io::stdout().lock(), "{line}");
}

/// Prints a line about what went wrong on standard error, which nobody may be reading either.
pub fn complain(line: &str) {
    let _ = writeln!(io::stderr().lock(), "cirri: {line}");
}

/// Whether colours may be used: standard output is a terminal and `NO_COLOR` is not set.
pub fn colours() -> bool {
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// The terminal's width in characters, if standard output is one.
pub fn terminal_width() -> Option<usize> {
    if !io::stdout().is_terminal() {
        return None;
    }
    let size = rustix::termios::tcgetwinsize(io::stdout()).ok()?;
    (size.ws_col > 0).then(|| usize::from(size.ws_col))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new(["id", "labels"]);
        table.row(["1".into(), "k8s:app=web,k8s:tier=front".into()]);
        table.row(["20".into(), String::new()]);
        table
    }

    #[test]
    fn columns_line_up_and_no_line_ends_in_blanks() {
        assert_eq!(table().render(None), "ID  LABELS\n1   k8s:app=web,k8s:tier=front\n20\n");
    }

    #[test]
    fn the_widest_column_gives_way() {
        let text = table().render(Some(16));
        assert_eq!(text.lines().nth(1), Some("1   k8s:app=web…"));
        assert!(text.lines().all(|line| line.chars().count() <= 16));
    }
}
