//! `cirri bench verify`: each program's bill.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::instance::{self, Instance};
use crate::output::{self, Table};

/// What one program costs; see `cirri_loader::Bill`.
#[derive(Clone, Debug, Serialize)]
pub struct Bill {
    name: String,
    verified: u32,
    stack: u32,
    xlated: u32,
    jited: u32,
}

impl Bill {
    /// The program's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Verified instructions; bytes of stack, instructions and machine code.
    pub fn figures(&self) -> [u32; 4] {
        [self.verified, self.stack, self.xlated, self.jited]
    }
}

/// Loads the programs and asks the kernel.
pub fn run(pin_root: &Path) -> Result<Vec<Bill>> {
    instance::sweep(pin_root);
    let mut instance = Instance::load(pin_root, 0)?;
    let bills = instance.datapath.bills()?;
    let shown = |bill: cirri_loader::Bill| {
        let cirri_loader::Bill { name, verified, stack, xlated, jited } = bill;
        Bill { name, verified, stack, xlated, jited }
    };
    Ok(bills.into_iter().map(shown).collect())
}

/// As columns.
pub fn table(bills: &[Bill]) -> String {
    let mut table = Table::new(["program", "verified", "stack", "xlated", "jited"]);
    for bill in bills {
        let [verified, stack, xlated, jited] = bill.figures().map(|figure| figure.to_string());
        table.row([bill.name.clone(), verified, stack, xlated, jited]);
    }
    table.render(output::terminal_width())
}
