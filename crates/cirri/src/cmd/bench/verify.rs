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
        let figures = [bill.verified, bill.stack, bill.xlated, bill.jited].map(|figure| figure.to_string());
        let [verified, stack, xlated, jited] = figures;
        table.row([bill.name.clone(), verified, stack, xlated, jited]);
    }
    table.render(output::terminal_width())
}
