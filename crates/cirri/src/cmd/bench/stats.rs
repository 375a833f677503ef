//! What is quoted of many rounds.

use serde::Serialize;

/// Least, quartile and median of all rounds. Other work on the machine only ever adds time, so the
/// least and the quartile are what compares; the median shows the noise.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Spread {
    pub min: f64,
    pub p25: f64,
    pub median: f64,
}

impl Spread {
    /// Of at least one round.
    pub fn of(rounds: &[f64]) -> Option<Spread> {
        let mut sorted = rounds.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |quarter: usize| sorted.get((sorted.len().max(1) - 1) * quarter / 4).copied();
        Some(Spread { min: at(0)?, p25: at(1)?, median: at(2)? })
    }

    /// What is left of it without what `other` takes.
    pub fn without(&self, other: &Spread) -> Spread {
        Spread { min: self.min - other.min, p25: self.p25 - other.p25, median: self.median - other.median }
    }
}

/// The value that a share of all is at most.
pub fn quantile(all: &[f64], share: f64) -> Option<f64> {
    let mut sorted = all.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(((sorted.len().max(1) - 1) as f64 * share) as usize).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_of_five_rounds_are_three_of_them() {
        let spread = Spread::of(&[5.0, 1.0, 4.0, 2.0, 3.0]).unwrap();
        assert_eq!(spread, Spread { min: 1.0, p25: 2.0, median: 3.0 });
        assert_eq!(spread.without(&spread), Spread { min: 0.0, p25: 0.0, median: 0.0 });
        assert_eq!(Spread::of(&[]), None);
    }
}
