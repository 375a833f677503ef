//! Who reaches whom: a table that a person can read and a test can compare.

use std::collections::BTreeMap;
use std::fmt;

use super::CaseError;
use crate::reference::Protocol;

/// One thing that is tried: a protocol and a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Probe {
    /// Protocol.
    pub protocol: Protocol,
    /// Port.
    pub port: u16,
}

/// What every case tries: the ports that every pod of the base serves.
pub const PROBES: [Probe; 4] = [
    Probe { protocol: Protocol::Tcp, port: 80 },
    Probe { protocol: Protocol::Tcp, port: 81 },
    Probe { protocol: Protocol::Udp, port: 80 },
    Probe { protocol: Protocol::Udp, port: 81 },
];

/// Address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Both families.
pub const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// One attempt.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cell {
    /// Family of the addresses.
    pub family: Family,
    /// What is tried.
    pub probe: Probe,
    /// Who tries.
    pub from: String,
    /// Who is tried.
    pub to: String,
}

/// Whether each attempt passes. Pairs of which none is a pod have no cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Matrix {
    participants: Vec<String>,
    cells: BTreeMap<Cell, bool>,
}

/// A cell that two matrices disagree on.
#[derive(Debug)]
pub struct Difference {
    cell: Cell,
    left: Option<bool>,
    right: Option<bool>,
}

impl Matrix {
    /// Asks `passes` for every pair with a pod in it, every probe and family; `None` leaves the cell out.
    pub fn fill(participants: &[String], mut passes: impl FnMut(&Cell) -> Option<bool>) -> Matrix {
        let mut cells = BTreeMap::new();
        for family in FAMILIES {
            for probe in PROBES {
                for from in participants {
                    for to in participants.iter().filter(|to| is_pod(from) || is_pod(to)) {
                        let cell = Cell { family, probe, from: from.clone(), to: to.clone() };
                        if let Some(passes) = passes(&cell) {
                            cells.insert(cell, passes);
                        }
                    }
                }
            }
        }
        Matrix { participants: participants.to_vec(), cells }
    }

    /// Who sends and receives, in order.
    pub fn participants(&self) -> &[String] {
        &self.participants
    }

    /// Whether the attempt passes; `None` if the matrix does not say.
    pub fn get(&self, cell: &Cell) -> Option<bool> {
        self.cells.get(cell).copied()
    }

    /// Number of cells.
    pub fn len(&self) -> usize {
        self.cells.len()
    }

    /// Whether there is no cell at all.
    pub fn is_empty(&self) -> bool {
        self.cells.is_empty()
    }

    /// All cells.
    pub fn cells(&self) -> impl Iterator<Item = (&Cell, bool)> {
        self.cells.iter().map(|(cell, passes)| (cell, *passes))
    }

    /// The cells that stand in either and are not equal.
    pub fn differences(&self, other: &Matrix) -> impl Iterator<Item = Difference> {
        let mut cells: Vec<&Cell> = self.cells.keys().chain(other.cells.keys()).collect();
        cells.sort();
        cells.dedup();
        cells
            .into_iter()
            .map(|cell| Difference { cell: cell.clone(), left: self.get(cell), right: other.get(cell) })
            .filter(|difference| difference.left != difference.right)
            .collect::<Vec<_>>()
            .into_iter()
    }

    /// Reads what [`Matrix`]'s `Display` writes.
    ///
    /// # Errors
    /// If a line has another form.
    pub fn parse(text: &str) -> Result<Matrix, CaseError> {
        let mut matrix = Matrix { participants: Vec::new(), cells: BTreeMap::new() };
        let mut planes: Vec<(Family, Probe)> = Vec::new();
        let mut columns: Vec<&str> = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let wrong = |problem: String| CaseError::Text { file: "expected.txt", line: index + 1, problem };
            if line.trim().is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some((families, probes)) = line.split_once(": ") {
                if !columns.is_empty() {
                    (planes, columns) = (Vec::new(), Vec::new());
                }
                for family in families.split_whitespace() {
                    let family = Family::parse(family).ok_or_else(|| wrong(format!("no family {family:?}")))?;
                    for probe in probes.split_whitespace() {
                        let probe = Probe::parse(probe).ok_or_else(|| wrong(format!("no probe {probe:?}")))?;
                        planes.push((family, probe));
                    }
                }
            } else if columns.is_empty() {
                columns = line.split_whitespace().collect();
                matrix.participants = columns.iter().map(|name| name.to_string()).collect();
            } else {
                let mut words = line.split_whitespace();
                let from = words.next().unwrap_or_default();
                let marks: Vec<&str> = words.collect();
                if marks.len() != columns.len() {
                    return Err(wrong(format!("{} marks for {} columns", marks.len(), columns.len())));
                }
                for (to, mark) in columns.iter().zip(marks) {
                    let passes = match mark {
                        "." => true,
                        "X" => false,
                        "-" => continue,
                        other => return Err(wrong(format!("{other:?} is none of . X -"))),
                    };
                    for (family, probe) in &planes {
                        let (from, to) = (from.to_string(), to.to_string());
                        matrix.cells.insert(Cell { family: *family, probe: *probe, from, to }, passes);
                    }
                }
            }
        }
        Ok(matrix)
    }

    /// The rows of one family and probe.
    fn plane(&self, family: Family, probe: Probe) -> String {
        let width = self.participants.iter().map(String::len).max().unwrap_or_default();
        let mut text = format!("{:width$}", "");
        for name in &self.participants {
            text.push_str(&format!(" {name}"));
        }
        for from in &self.participants {
            text.push_str(&format!("\n{from:width$}"));
            for to in &self.participants {
                let cell = Cell { family, probe, from: from.clone(), to: to.clone() };
                let mark = match self.get(&cell) {
                    Some(true) => ".",
                    Some(false) => "X",
                    None => "-",
                };
                text.push_str(&format!(" {mark:^width$}", width = to.len()));
            }
        }
        // The marks of a column are centred: no blanks at the end of a line.
        text.lines().map(|line| format!("{}\n", line.trim_end())).collect()
    }
}

/// Pods are named `namespace/name`; nobody else has a slash.
pub(super) fn is_pod(name: &str) -> bool {
    name.contains('/')
}

impl Probe {
    pub(super) fn parse(text: &str) -> Option<Probe> {
        PROBES.into_iter().find(|probe| probe.to_string() == text)
    }
}

impl Family {
    pub(super) fn parse(text: &str) -> Option<Family> {
        FAMILIES.into_iter().find(|family| family.to_string() == text)
    }
}

impl fmt::Display for Matrix {
    /// Equal planes stand together under one heading.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "# Rows send, columns receive. '.' passes, 'X' is dropped, '-' has no pod at either end.")?;
        let mut planes: Vec<(String, BTreeMap<Family, Vec<String>>)> = Vec::new();
        for family in FAMILIES {
            for probe in PROBES {
                let text = self.plane(family, probe);
                let at = planes.iter().position(|(known, _)| *known == text).unwrap_or_else(|| {
                    planes.push((text, BTreeMap::new()));
                    planes.len() - 1
                });
                planes[at].1.entry(family).or_default().push(probe.to_string());
            }
        }
        for (text, heading) in planes {
            writeln!(f)?;
            match (heading.get(&Family::V4), heading.get(&Family::V6)) {
                (Some(v4), Some(v6)) if v4 == v6 => writeln!(f, "ipv4 ipv6: {}", v4.join(" "))?,
                _ => {
                    for (family, probes) in heading {
                        writeln!(f, "{family}: {}", probes.join(" "))?;
                    }
                }
            }
            f.write_str(&text)?;
        }
        Ok(())
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.protocol, self.port)
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::V4 => "ipv4",
            Family::V6 => "ipv6",
        })
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {} {} {}", self.from, self.to, self.probe, self.family)
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = |passes: Option<bool>| match passes {
            Some(true) => "passes",
            Some(false) => "dropped",
            None => "not asked",
        };
        write!(f, "{}: {} / {}", self.cell, word(self.left), word(self.right))
    }
}
