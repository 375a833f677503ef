//! The same way that lab traffic takes, by plain kernel routing: two nodes on a bridge, a client and
//! a server on the first, a server on the second, and nothing of Cirri.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::lab::netns;

/// The topology; removed with its guard.
pub struct Plain {
    prefix: String,
    names: &'static [&'static str],
}

pub const NEAR: Ipv4Addr = Ipv4Addr::new(10, 99, 2, 2);
pub const FAR: Ipv4Addr = Ipv4Addr::new(10, 99, 3, 2);
/// The far server by a VXLAN device between the nodes.
pub const FAR_BY_VXLAN: Ipv4Addr = Ipv4Addr::new(10, 99, 4, 2);

const NAMESPACES: [&str; 6] = ["lan", "node1", "node2", "client", "near", "far"];

/// What `ip` is told, in order; `@x` is namespace `x`. The client speaks to the address behind the
/// VXLAN device from an address of its own, so that the answers take the same way back.
const SCRIPT: &str = "
@lan link add lan type bridge
@lan link set lan up
@lan link add p1 type veth peer name eth0 netns @node1
@lan link add p2 type veth peer name eth0 netns @node2
@lan link set p1 master lan up
@lan link set p2 master lan up
@node1 link add c type veth peer name eth0 netns @client
@node1 link add s type veth peer name eth0 netns @near
@node2 link add f type veth peer name eth0 netns @far
@node1 addr add 172.30.0.1/24 dev eth0
@node2 addr add 172.30.0.2/24 dev eth0
@node1 addr add 10.99.1.1/24 dev c
@node1 addr add 10.99.2.1/24 dev s
@node2 addr add 10.99.3.1/24 dev f
@client addr add 10.99.1.2/24 dev eth0
@client addr add 10.99.5.2/32 dev eth0
@near addr add 10.99.2.2/24 dev eth0
@far addr add 10.99.3.2/24 dev eth0
@far addr add 10.99.4.2/32 dev eth0
@node1 link set eth0 up
@node1 link set c up
@node1 link set s up
@node2 link set eth0 up
@node2 link set f up
@client link set eth0 up
@near link set eth0 up
@far link set eth0 up
@node1 link add vx0 type vxlan id 77 local 172.30.0.1 remote 172.30.0.2 dstport 8472
@node2 link add vx0 type vxlan id 77 local 172.30.0.2 remote 172.30.0.1 dstport 8472
@node1 addr add 10.99.9.1/24 dev vx0
@node2 addr add 10.99.9.2/24 dev vx0
@node1 link set vx0 mtu 1450 up
@node2 link set vx0 mtu 1450 up
@client route add default via 10.99.1.1
@client route add 10.99.4.0/24 via 10.99.1.1 src 10.99.5.2 mtu 1450
@near route add default via 10.99.2.1
@far route add default via 10.99.3.1
@far route add 10.99.5.0/24 via 10.99.3.1 src 10.99.4.2 mtu 1450
@node1 route add 10.99.3.0/24 via 172.30.0.2
@node1 route add 10.99.4.0/24 via 10.99.9.2
@node1 route add 10.99.5.0/24 dev c
@node2 route add 10.99.4.0/24 dev f
@node2 route add 10.99.1.0/24 via 172.30.0.1
@node2 route add 10.99.5.0/24 via 10.99.9.1
";

/// The same with one node only: a client and a server on it, at the same addresses.
const SMALL_NAMESPACES: [&str; 3] = ["node1", "client", "near"];
const SMALL_SCRIPT: &str = "
@node1 link add c type veth peer name eth0 netns @client
@node1 link add s type veth peer name eth0 netns @near
@node1 addr add 10.99.1.1/24 dev c
@node1 addr add 10.99.2.1/24 dev s
@client addr add 10.99.1.2/24 dev eth0
@near addr add 10.99.2.2/24 dev eth0
@node1 link set c up
@node1 link set s up
@client link set eth0 up
@near link set eth0 up
@client route add default via 10.99.1.1
@near route add default via 10.99.2.1
";

impl Plain {
    /// Builds it.
    pub fn up() -> Result<Plain> {
        Plain::build("", &NAMESPACES, SCRIPT)
    }

    /// Builds one with one node. `tag` tells those of this process apart.
    pub fn small(tag: &str) -> Result<Plain> {
        Plain::build(&format!("{tag}-"), &SMALL_NAMESPACES, SMALL_SCRIPT)
    }

    fn build(tag: &str, names: &'static [&'static str], script: &str) -> Result<Plain> {
        let plain = Plain { prefix: format!("cirri-bench-{}-{tag}", std::process::id()), names };
        for name in names {
            netns::create(&plain.name(name))?;
        }
        for line in script.lines().filter(|line| !line.is_empty()) {
            plain.ip(line)?;
        }
        for node in names.iter().filter(|name| name.starts_with("node")) {
            netns::within(&plain.netns(node), || std::fs::write("/proc/sys/net/ipv4/ip_forward", "1"))??;
        }
        Ok(plain)
    }

    /// The file of one of its namespaces.
    pub fn netns(&self, name: &str) -> PathBuf {
        netns::path(&self.name(name))
    }

    fn name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn ip(&self, line: &str) -> Result<()> {
        let mut words = line.split_whitespace().map(|word| match word.strip_prefix('@') {
            Some(name) => self.name(name),
            None => word.to_owned(),
        });
        let namespace = words.next().context("an empty line")?;
        let mut ip = Command::new("ip");
        ip.arg("-n").arg(namespace).args(words);
        let output = ip.output().context("cannot run `ip` (Debian: iproute2)")?;
        if !output.status.success() {
            bail!("ip: `{line}`: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        for name in self.names {
            if let Err(error) = netns::delete(&self.name(name)) {
                eprintln!("cirri: {}: {error}", self.name(name));
            }
        }
    }
}
