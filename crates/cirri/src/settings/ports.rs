//! Sets of ports, as the kernel writes them: `1000-1999,8472`.

use std::fmt;

use crate::config::PortRange;

/// A set of ports.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ports {
    bits: Vec<u64>,
}

impl Ports {
    /// What the kernel says; anything else in it is passed over.
    pub fn parse(text: &str) -> Ports {
        let mut all = Ports { bits: vec![0; 1024] };
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            if let (Ok(first), Ok(last)) = (first.parse(), last.parse()) {
                all.add(first, last);
            }
        }
        all
    }

    /// These and those of a range.
    pub fn with(&self, range: PortRange) -> Ports {
        let mut all = self.clone();
        all.add(range.first, range.last);
        all
    }

    /// Whether a range is among them.
    pub fn contains(&self, range: PortRange) -> bool {
        (range.first..=range.last).all(|port| self.has(port.into()))
    }

    /// These, but none of those.
    pub fn without(&self, others: &Ports) -> Ports {
        Ports { bits: self.bits.iter().zip(&others.bits).map(|(ours, theirs)| ours & !theirs).collect() }
    }

    fn add(&mut self, first: u16, last: u16) {
        for port in first..=last {
            self.bits[usize::from(port) / 64] |= 1 << (port % 64);
        }
    }

    fn has(&self, port: u32) -> bool {
        self.bits.get(port as usize / 64).is_some_and(|word| word & (1 << (port % 64)) != 0)
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        let mut port = 0u32;
        while port <= u32::from(u16::MAX) {
            let first = port;
            while self.has(port) {
                port += 1;
            }
            match port - first {
                0 => port += 1,
                1 => {
                    write!(f, "{separator}{first}")?;
                    separator = ",";
                }
                _ => {
                    write!(f, "{separator}{first}-{}", port - 1)?;
                    separator = ",";
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_are_one_as_the_kernel_writes_them() {
        let range = |first, last| PortRange { first, last };
        let ports = Ports::parse("1-2,8472,65535").with(range(32768, 49151)).with(range(49152, 50175));
        assert_eq!(ports.to_string(), "1-2,8472,32768-50175,65535");
        assert_eq!(ports.without(&Ports::parse("32768-49151,1")).to_string(), "2,8472,49152-50175,65535");
        assert_eq!(Ports::parse("").to_string(), "");
        assert!(ports.contains(range(32768, 50175)) && !ports.contains(range(8472, 8473)));
    }
}
