//! Services by the kernel's packet filters, as kube-proxy makes them: chains of iptables, and a verdict map of
//! nftables. Built here from what those modes of kube-proxy are documented to do.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::plain::{NEAR, Plain};
use crate::lab::netns;

/// Endpoints of every service.
const ENDPOINTS: u32 = 3;
/// Bit of the packets' mark that asks for masquerade.
const MASQUERADE: &str = "0x4000";
const CLIENTS: &str = "10.99.1.0/24";

/// Which filter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Filter {
    /// A chain of rules that is walked until one matches (`iptables-legacy`).
    Iptables,
    /// One lookup in a map, then the service's own chain.
    Nftables,
}

/// A node with so many services, of which the middle one leads to the server.
pub struct Rival {
    pub place: Plain,
    filter: Filter,
    services: u32,
    /// How long the rules took to load.
    pub loaded_in: Duration,
}

impl Rival {
    /// Builds it.
    pub fn up(filter: Filter, services: u32) -> Result<Rival> {
        let tag = match filter {
            Filter::Iptables => "ipt",
            Filter::Nftables => "nft",
        };
        let place = Plain::small(&format!("{tag}{services}"))?;
        let mut rival = Rival { place, filter, services, loaded_in: Duration::ZERO };
        let rules = match filter {
            Filter::Iptables => iptables(services),
            Filter::Nftables => nftables(services),
        };
        rival.loaded_in = rival.load(&rules)?;
        Ok(rival)
    }

    /// Where the live service is.
    pub fn service(&self) -> SocketAddr {
        SocketAddr::new(address(self.services / 2).into(), 80)
    }

    /// Adds one service more, with nothing else written again; how long that takes.
    pub fn add_one(&mut self) -> Result<Duration> {
        let one = self.services;
        let rules = match self.filter {
            Filter::Iptables => {
                let mut text = "*nat\n".to_owned();
                iptables_chains(&mut text, one);
                iptables_rules(&mut text, one, &dead(one));
                text + "COMMIT\n"
            }
            Filter::Nftables => {
                let mut text = "table ip services {\n".to_owned();
                nftables_chains(&mut text, one, &dead(one));
                let _ = writeln!(text, "}}\nadd element ip services by-address {{ {} }}", nftables_element(one));
                text
            }
        };
        self.services += 1;
        self.load(&rules)
    }

    fn load(&self, rules: &str) -> Result<Duration> {
        let words: &[&str] = match self.filter {
            Filter::Iptables => &["iptables-legacy-restore", "--noflush", "--wait"],
            Filter::Nftables => &["nft", "-f", "-"],
        };
        netns::within(&self.place.netns("node1"), || fed(words, rules))?
    }
}

/// Runs a program with this input.
fn fed(words: &[&str], input: &str) -> Result<Duration> {
    let [program, arguments @ ..] = words else { bail!("no program") };
    let begun = Instant::now();
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot run {program} (Debian: iptables, nftables)"))?;
    child.stdin.take().context("no pipe to it")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(begun.elapsed())
}

fn address(n: u32) -> Ipv4Addr {
    let [.., high, low] = n.to_be_bytes();
    Ipv4Addr::new(10, 96, high, low)
}

/// Endpoints that nobody is at.
fn dead(n: u32) -> Vec<Ipv4Addr> {
    (0..ENDPOINTS).map(|i| Ipv4Addr::new(10, 98, 0, ((n * ENDPOINTS + i) % 250) as u8 + 1)).collect()
}

/// Endpoints of the services below `count`: the middle one's is the server, three times.
fn endpoints(n: u32, count: u32) -> Vec<Ipv4Addr> {
    if n == count / 2 { vec![NEAR; ENDPOINTS as usize] } else { dead(n) }
}

// === iptables ===

fn iptables(count: u32) -> String {
    let mut text = format!(
        "*filter\n:KUBE-FORWARD - [0:0]\n-A FORWARD -j KUBE-FORWARD\n\
         -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n\
         -A KUBE-FORWARD -m mark --mark {MASQUERADE}/{MASQUERADE} -j ACCEPT\n\
         -A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\nCOMMIT\n\
         *nat\n:KUBE-SERVICES - [0:0]\n:KUBE-POSTROUTING - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n\
         -A PREROUTING -j KUBE-SERVICES\n-A OUTPUT -j KUBE-SERVICES\n-A POSTROUTING -j KUBE-POSTROUTING\n\
         -A KUBE-MARK-MASQ -j MARK --set-xmark {MASQUERADE}/{MASQUERADE}\n\
         -A KUBE-POSTROUTING -m mark ! --mark {MASQUERADE}/{MASQUERADE} -j RETURN\n\
         -A KUBE-POSTROUTING -j MARK --set-xmark {MASQUERADE}/0x0\n\
         -A KUBE-POSTROUTING -j MASQUERADE --random-fully\n"
    );
    for n in 0..count {
        iptables_chains(&mut text, n);
    }
    for n in 0..count {
        iptables_rules(&mut text, n, &endpoints(n, count));
    }
    text + "COMMIT\n"
}

fn iptables_chains(text: &mut String, n: u32) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, ":KUBE-SVC-{n:08X} - [0:0]");
    for i in 0..ENDPOINTS {
        let _ = writeln!(text, ":KUBE-SEP-{n:08X}-{i} - [0:0]");
    }
}

fn iptables_rules(text: &mut String, n: u32, endpoints: &[Ipv4Addr]) {
    let to = format!("-d {}/32 -p tcp -m comment --comment \"ns/s{n} cluster IP\" -m tcp --dport 80", address(n));
    let _ = writeln!(text, "-A KUBE-SERVICES {to} -j KUBE-SVC-{n:08X}");
    let _ = writeln!(text, "-A KUBE-SVC-{n:08X} ! -s {CLIENTS} {to} -j KUBE-MARK-MASQ");
    for (i, ip) in endpoints.iter().enumerate() {
        let left = endpoints.len() - i;
        let chance = if left > 1 {
            format!("-m statistic --mode random --probability {:.10} ", 1.0 / left as f64)
        } else {
            String::new()
        };
        let about = format!("-m comment --comment \"ns/s{n} -> {ip}:8080\"");
        let _ = writeln!(text, "-A KUBE-SVC-{n:08X} {about} {chance}-j KUBE-SEP-{n:08X}-{i}");
        let _ = writeln!(text, "-A KUBE-SEP-{n:08X}-{i} -s {ip}/32 {about} -j KUBE-MARK-MASQ");
        let _ = writeln!(text, "-A KUBE-SEP-{n:08X}-{i} -p tcp {about} -m tcp -j DNAT --to-destination {ip}:8080");
    }
}

// === nftables ===

fn nftables(count: u32) -> String {
    let mut text =
        format!("table ip services {{\n chain masquerade-mark {{ meta mark set meta mark or {MASQUERADE}; }}\n");
    for n in 0..count {
        nftables_chains(&mut text, n, &endpoints(n, count));
    }
    let elements: Vec<String> = (0..count).map(nftables_element).collect();
    let _ = write!(
        text,
        " map by-address {{ type ipv4_addr . inet_proto . inet_service : verdict; elements = {{ {} }} }}\n \
         chain services {{ ip daddr . meta l4proto . th dport vmap @by-address; }}\n \
         chain prerouting {{ type nat hook prerouting priority dstnat; policy accept; jump services; }}\n \
         chain output {{ type nat hook output priority -100; policy accept; jump services; }}\n \
         chain postrouting {{ type nat hook postrouting priority srcnat; policy accept; \
         meta mark & {MASQUERADE} != 0 masquerade fully-random; }}\n \
         chain forward {{ type filter hook forward priority filter; policy accept; ct state invalid drop; \
         ct state established,related accept; }}\n}}\n",
        elements.join(",\n  ")
    );
    text
}

fn nftables_element(n: u32) -> String {
    format!("{} . tcp . 80 : goto service-{n}", address(n))
}

fn nftables_chains(text: &mut String, n: u32, endpoints: &[Ipv4Addr]) {
    for (i, ip) in endpoints.iter().enumerate() {
        let _ = writeln!(
            text,
            " chain endpoint-{n}-{i} {{ ip saddr {ip} jump masquerade-mark; meta l4proto tcp dnat to {ip}:8080; }}"
        );
    }
    let choices: Vec<String> = (0..endpoints.len()).map(|i| format!("{i} : goto endpoint-{n}-{i}")).collect();
    let _ = writeln!(
        text,
        " chain service-{n} {{ ip daddr {} tcp dport 80 ip saddr != {CLIENTS} jump masquerade-mark; \
         numgen random mod {} vmap {{ {} }}; }}",
        address(n),
        endpoints.len(),
        choices.join(", ")
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_service_leads_to_the_server_and_no_other_does() {
        for rules in [iptables(5), nftables(5)] {
            let leading: Vec<&str> = rules.lines().filter(|line| line.contains("10.99.2.2:8080")).collect();
            assert!(leading.len() >= 3 && leading.iter().all(|line| line.contains('2')), "{leading:?}");
            for n in 0..5 {
                assert!(rules.contains(&address(n).to_string()));
            }
        }
    }
}
