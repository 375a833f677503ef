//! Probe results for people: one matrix a port, or one line a probe.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::echo::Port;
use super::probe::{Answered, Cell};
use super::prober::Verdict;

/// Widest table whose columns carry names; a wider one numbers them.
const WIDTH_MAX: usize = 110;

/// The matrices of all ports, rows asking and columns asked, in the order of the cells.
pub fn render(cells: &[Cell]) -> String {
    let mut ports: BTreeMap<Port, Vec<&Cell>> = BTreeMap::new();
    for cell in cells {
        let port = Port { number: cell.port.unwrap_or(0), protocol: cell.protocol };
        ports.entry(port).or_default().push(cell);
    }
    let mut text = String::new();
    for (port, cells) in ports {
        text.push_str(&table(port, &cells));
        text.push('\n');
    }
    let allowed = cells.iter().filter(|cell| cell.outcome.verdict == Verdict::Allowed).count();
    let denied = cells.iter().filter(|cell| cell.outcome.verdict == Verdict::Denied).count();
    let refused = cells.iter().filter(|cell| cell.outcome.verdict == Verdict::Refused).count();
    let failed = cells.len() - allowed - denied - refused;
    let _ = writeln!(text, "✓ both families   ✗ denied   4, 6 only that family   ○ refused   ! error   · not asked");
    let _ = writeln!(
        text,
        "{allowed} allowed, {denied} denied, {refused} refused, {failed} errors of {} probes",
        cells.len()
    );
    if let Some(cell) = cells.iter().find(|cell| cell.outcome.verdict == Verdict::Error) {
        let _ = writeln!(text, "first error: {}", line(cell));
    }
    text
}

/// All probes, a line each.
pub fn lines(cells: &[Cell]) -> String {
    cells.iter().map(|cell| line(cell) + "\n").collect()
}

fn line(cell: &Cell) -> String {
    let outcome = &cell.outcome;
    let target = match cell.port {
        Some(port) => format!("{}/{}", std::net::SocketAddr::new(cell.address, port), cell.protocol),
        None => format!("{} {}", cell.address, cell.protocol),
    };
    let name =
        if cell.destination == cell.address.to_string() { String::new() } else { format!(" {}", cell.destination) };
    let mut text = format!("{} →{name} {target}  {}  {:.1} ms", cell.source, word(outcome.verdict), outcome.time_ms);
    if let Some(error) = &outcome.error {
        let _ = write!(text, "  ({error})");
    }
    if cell.tries > 1 {
        let _ = write!(text, "  {} tries", cell.tries);
        for Answered { by, client, count } in &cell.answers {
            let _ = write!(text, ", {count} answered by {by}, which saw {client}");
        }
    } else if let (Some(pod), Some(client)) = (&outcome.answered_by, outcome.seen_client) {
        let _ = write!(text, "  answered by {pod}, which saw {client}");
    }
    text
}

fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Allowed => "✓ allowed",
        Verdict::Denied => "✗ denied",
        Verdict::Refused => "○ refused",
        Verdict::Error => "! error",
    }
}

fn table(port: Port, cells: &[&Cell]) -> String {
    let rows = in_order(cells.iter().map(|cell| cell.source.as_str()));
    let columns = in_order(cells.iter().map(|cell| cell.destination.as_str()));
    let mut grid: BTreeMap<(&str, &str), Vec<&Cell>> = BTreeMap::new();
    for cell in cells {
        grid.entry((&cell.source, &cell.destination)).or_default().push(cell);
    }
    let corner = "from ↓  to →";
    let names: usize = columns.iter().map(|name| name.chars().count() + 2).sum();
    let first = rows.iter().map(|name| name.chars().count()).chain([corner.chars().count()]).max().unwrap_or(0);
    let numbered = first + names > WIDTH_MAX;
    // Numbers are those of the rows, so that a column is found in the list of rows; what only answers comes below.
    let position = |name: &str| rows.iter().position(|row| *row == name);
    let extra: Vec<&str> = columns.iter().copied().filter(|name| position(name).is_none()).collect();
    let number = |name: &str| {
        let index = position(name).or_else(|| Some(rows.len() + extra.iter().position(|e| *e == name)?));
        index.map_or(0, |index| index + 1)
    };
    let label = |name: &str| if numbered { format!("{:>3} {name}", number(name)) } else { name.to_owned() };
    let head = |name: &str| if numbered { number(name).to_string() } else { name.to_owned() };
    let first = if numbered { first + 4 } else { first };

    let mut text = format!("{port}\n{corner:<first$}");
    for column in &columns {
        let _ = write!(text, "  {}", head(column));
    }
    text.push('\n');
    for row in &rows {
        let _ = write!(text, "{:<first$}", label(row));
        for column in &columns {
            let width = head(column).chars().count();
            let symbol = grid.get(&(*row, *column)).map_or("·", |cells| symbol(cells));
            let _ = write!(text, "  {symbol:<width$}");
        }
        while text.ends_with(' ') {
            text.pop();
        }
        text.push('\n');
    }
    if numbered {
        for name in &extra {
            let _ = writeln!(text, "{}", label(name));
        }
    }
    text
}

/// One mark for the probes of one pair and port, one of each family as a rule.
fn symbol(cells: &[&Cell]) -> &'static str {
    let allowed =
        |family: u8| cells.iter().any(|cell| cell.family == family && cell.outcome.verdict == Verdict::Allowed);
    if cells.iter().any(|cell| cell.outcome.verdict == Verdict::Error) {
        "!"
    } else if cells.iter().any(|cell| cell.outcome.verdict == Verdict::Refused) {
        "○"
    } else if cells.iter().all(|cell| cell.outcome.verdict == Verdict::Allowed) {
        "✓"
    } else if allowed(4) {
        "4"
    } else if allowed(6) {
        "6"
    } else {
        "✗"
    }
}

fn in_order<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut seen = Vec::new();
    for name in names {
        if !seen.contains(&name) {
            seen.push(name);
        }
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::super::echo::Transport;
    use super::super::prober::Outcome;
    use super::*;

    fn cell(from: &str, to: &str, family: u8, verdict: Verdict) -> Cell {
        let address = if family == 4 { "10.0.0.1" } else { "fd00::1" };
        Cell {
            source: from.into(),
            destination: to.into(),
            address: address.parse().unwrap(),
            port: Some(80),
            protocol: Transport::Tcp,
            family,
            outcome: Outcome { verdict, error: None, time_ms: 1.0, answered_by: None, seen_client: None },
            tries: 1,
            answers: Vec::new(),
        }
    }

    #[test]
    fn columns_line_up_and_families_share_a_mark() {
        use Verdict::{Allowed, Denied};
        let cells = [
            cell("a/one", "a/one", 4, Allowed),
            cell("a/one", "a/one", 6, Allowed),
            cell("a/one", "b/second", 4, Allowed),
            cell("a/one", "b/second", 6, Denied),
            cell("b/second", "a/one", 4, Denied),
            cell("b/second", "a/one", 6, Denied),
        ];
        let text = render(&cells);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[..4],
            ["80/tcp", "from ↓  to →  a/one  b/second", "a/one         ✓      4", "b/second      ✗      ·"]
        );
        assert!(text.contains("3 allowed, 3 denied, 0 refused, 0 errors of 6 probes"), "{text}");
    }

    #[test]
    fn a_wide_table_numbers_its_columns() {
        let names: Vec<String> = (0..9).map(|n| format!("namespace-{n}/some-rather-long-pod")).collect();
        let cells: Vec<Cell> =
            names.iter().flat_map(|from| names.iter().map(move |to| cell(from, to, 4, Verdict::Allowed))).collect();
        let text = render(&cells);
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH_MAX), "{text}");
        assert!(text.contains("  9 namespace-8/some-rather-long-pod"), "{text}");
    }
}
