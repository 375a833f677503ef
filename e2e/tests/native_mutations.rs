//! A million malformed packets through the packet path: it does not panic, and nothing passes that the
//! rules forbid, judged by a parser and a memory of connections of their own.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::LazyLock;

use cirri_abi::{GATEWAY_MAC, GATEWAY_V6, Hook};
use cirri_datapath::Verdict;
use cirri_e2e::fixtures::{Answer, Devices, Host, Native, addresses};
use cirri_e2e::mutate::{Mutator, tables};
use cirri_e2e::say;
use cirri_sim::Frame;

const DEVICES: Devices = Devices { a: 10, b: 11, eth: 2, overlay: 3 };
const PACKETS: usize = 1_000_000;
/// After as many the tables begin empty again.
const ROUND: usize = 20_000;

#[test]
fn nothing_passes_that_the_rules_forbid() {
    let mut mutator = Mutator::new(1, DEVICES);
    let (mut passed, mut node, mut oracle) = (0, Native::new(DEVICES), Oracle::default());
    for number in 0..PACKETS {
        if number % ROUND == 0 {
            (node, oracle) = (Native::new(DEVICES), Oracle::default());
            tables(DEVICES, 256).iter().for_each(|change| node.change(change));
        }
        let (hook, frame) = mutator.packet();
        let output = node.packet(hook, &frame).expect("the native host takes everything");
        node.events();
        let (Answer::Verdict(verdict), Some(out)) = (output.answer, output.frame) else {
            panic!("the native host answers everything")
        };
        if let Err(why) = oracle.judge(hook, &frame, verdict, &out) {
            panic!("packet {number} at {}: {verdict:?}, but {why}\nin  {frame:?}\nout {out:?}", Hook::name(hook));
        }
        passed += usize::from(!matches!(verdict, Verdict::Drop(_)));
    }
    say(format_args!("{passed} of {PACKETS} malformed packets passed, rightly"));
    assert!(passed * 20 > PACKETS && passed * 2 < PACKETS, "{passed} of {PACKETS} passed: the mutations miss the mark");
}

/// A packet as the oracle reads it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Read {
    src: IpAddr,
    dst: IpAddr,
    protocol: u8,
    sport: u16,
    dport: u16,
}

impl Read {
    fn turned(self) -> Read {
        Read { src: self.dst, dst: self.src, sport: self.dport, dport: self.sport, ..self }
    }
}

/// What a packet is, beyond its ends.
struct Kind {
    read: Read,
    /// Asks for a connection, so cannot be an answer.
    syn: bool,
    /// The datagram that it is a fragment of, and whether it is a later one.
    fragment: Option<(u32, bool)>,
    /// It is an error about this packet.
    quotes: Option<Read>,
    /// ICMP type.
    icmp: Option<u8>,
}

/// Remembers what it saw pass.
#[derive(Default)]
struct Oracle {
    opened: HashSet<Read>,
    fragments: HashMap<(IpAddr, IpAddr, u8, u32), (u16, u16)>,
}

impl Oracle {
    fn judge(&mut self, hook: u8, frame: &Frame, verdict: Verdict, out: &Frame) -> Result<(), String> {
        let to = match verdict {
            Verdict::Drop(_) => return Ok(()),
            Verdict::Local { ifindex } | Verdict::Device { ifindex } | Verdict::Neighbour { ifindex, .. } => {
                Some(ifindex)
            }
            Verdict::Continue => None,
        };
        if matches!(verdict, Verdict::Local { .. }) && is_gateways_answer(hook, frame, out) {
            return Ok(());
        }
        // What the node gets goes through its own stack, and meets `to_workload` if it is forwarded.
        if to.is_none() && matches!(hook, Hook::FROM_NETWORK) {
            return Ok(());
        }
        let Some(kind) = parse(&frame.bytes) else {
            let link = frame.bytes.get(12..14).is_none_or(|kind| kind != [8, 0] && kind != [0x86, 0xdd]);
            // Other protocols of the link are the node's, except out of a workload.
            return if link && to.is_none() && hook != Hook::FROM_WORKLOAD {
                Ok(())
            } else {
                Err("it is nothing".into())
            };
        };
        if to.is_none() && is_on_link(&kind) && hook != Hook::FROM_WORKLOAD {
            return Ok(());
        }
        if to.is_none() && hook == Hook::TO_OVERLAY {
            return if is(&kind.read.src, "n1") { Ok(()) } else { Err("the node sends as somebody else".into()) };
        }
        let Some(after) = parse(&out.bytes) else { return Err("it became nothing".into()) };
        self.check_ends(hook, frame, verdict, out, &kind, &after)?;
        if let Some(quoted) = after.quotes {
            return self.check_error(hook, &after, quoted, to.is_none());
        }
        self.check_policy(hook, frame, &kind, &after, to.is_none())
    }

    /// Who sent it, and whether it goes where it says.
    fn check_ends(
        &self,
        hook: u8,
        frame: &Frame,
        verdict: Verdict,
        out: &Frame,
        kind: &Kind,
        after: &Kind,
    ) -> Result<(), String> {
        if hook == Hook::FROM_WORKLOAD && Some(frame.ifindex) != device(&kind.read.src) {
            return Err("another than the workload behind the door sends".into());
        }
        match verdict {
            Verdict::Local { ifindex } if device(&after.read.dst) != Some(ifindex) => {
                Err("it goes to the wrong workload".into())
            }
            Verdict::Device { .. } => {
                let identity = if frame.ifindex == DEVICES.a { 300 } else { 400 };
                let right = out.tunnel_to == Some((u32::from_ne_bytes([192, 168, 0, 2]), identity));
                let remote = is_remote(&after.read.dst);
                if right && remote { Ok(()) } else { Err(format!("the tunnel is wrong: {:?}", out.tunnel_to)) }
            }
            Verdict::Neighbour { .. } if is_remote(&after.read.dst) || device(&after.read.dst).is_some() => {
                Err("it leaves for an address of the cluster".into())
            }
            Verdict::Continue if hook == Hook::FROM_WORKLOAD && !is(&kind.read.dst, "n1") => {
                Err("it is handed to the node, but is for another".into())
            }
            Verdict::Continue if hook == Hook::FROM_OVERLAY && !is(&kind.read.dst, "n1") => {
                Err("it is handed to the node, but is for another".into())
            }
            Verdict::Continue if hook == Hook::TO_WORKLOAD && device(&kind.read.dst) != Some(frame.ifindex) => {
                // The node may err towards whom it likes: it routed the error here itself.
                let own = is(&kind.read.src, "n1") && kind.quotes.is_some();
                if own { Ok(()) } else { Err("it enters the wrong workload".into()) }
            }
            _ => Ok(()),
        }
    }

    /// An error goes against a packet that passed, to its sender.
    fn check_error(&self, hook: u8, after: &Kind, quoted: Read, continues: bool) -> Result<(), String> {
        let own = is(&after.read.src, "n1") || is(&after.read.dst, "n1");
        if continues && own && hook != Hook::FROM_NETWORK {
            return Ok(());
        }
        if quoted.src != after.read.dst {
            return Err("the error is for another than the sender".into());
        }
        let known = self.opened.contains(&quoted) || self.opened.contains(&quoted.turned());
        if known { Ok(()) } else { Err(format!("no such packet passed: {quoted:?}")) }
    }

    /// Whether a rule allows it, or it is of a connection that one allowed.
    fn check_policy(
        &mut self,
        hook: u8,
        frame: &Frame,
        kind: &Kind,
        after: &Kind,
        continues: bool,
    ) -> Result<(), String> {
        if hook == Hook::FROM_OVERLAY && continues {
            // For the node itself, as `check_ends` saw.
            return Ok(());
        }
        // Into a workload it is known by the addresses that this has; out of one, by those it came with.
        let at = if hook == Hook::FROM_WORKLOAD { kind } else { after };
        let mut read = at.read;
        if let Some((id, later)) = kind.fragment {
            let came = kind.read;
            let key = (came.src, came.dst, came.protocol, id);
            if later {
                let Some(ports) = self.fragments.get(&key) else {
                    return Err("its first fragment did not pass".into());
                };
                (read.sport, read.dport) = *ports;
            } else {
                self.fragments.insert(key, (read.sport, read.dport));
            }
        }
        let sender = match frame.tunnel {
            Some(key) if hook == Hook::FROM_OVERLAY => Some(if key.vni == 1 { 6 } else { key.vni }),
            _ => None,
        };
        let answers = !kind.syn && self.opened.contains(&read.turned());
        if self.opened.contains(&read) || answers {
            return Ok(());
        }
        if hook == Hook::FROM_OVERLAY {
            let remote =
                frame.tunnel.is_some_and(|key| key.remote == u32::from_ne_bytes([192, 168, 0, 2]) && key.vni != 0);
            if !remote || !is_remote(&read.src) {
                return Err("the overlay does not vouch for it".into());
            }
        }
        if !allowed(&read, sender) {
            return Err(format!("no rule allows {read:?} ({:?})", kind.icmp));
        }
        self.opened.insert(read);
        Ok(())
    }
}

/// The rules of `mutate::tables`, said once more.
fn allowed(read: &Read, sender: Option<u32>) -> bool {
    let (from, to, tcp) = (&read.src, &read.dst, read.protocol == 6);
    let host = is(from, "n1") || is(to, "n1");
    // Out of the overlay the VNI says who sends, elsewhere the address.
    let sends = |name: &str, identity: u32| sender.map_or(is(from, name), |sender| sender == identity);
    let leaves = !is(from, "a") || host || is(to, "b") || is(to, "c") || (tcp && read.dport == 443);
    let enters_a = !is(to, "a") || host || (sends("b", 400) && tcp && read.dport == 80);
    let open = sends("c", 500) || (tcp && read.dport == 8080) || (sends("a", 300) && tcp && read.dport == 80);
    let enters_b = !is(to, "b") || host || open;
    leaves && enters_a && enters_b
}

/// ARP and neighbour discovery are answered to the asker, in the gateway's name.
fn is_gateways_answer(hook: u8, frame: &Frame, out: &Frame) -> bool {
    let byte = |at: usize| out.bytes.get(at).copied();
    let arp = out.bytes.get(12..14) == Some(&[8, 6]) && out.bytes.get(20..22) == Some(&[0, 2]);
    let gateway = out.bytes.get(22..38) == Some(&GATEWAY_V6.octets()[..]);
    let neighbour =
        out.bytes.get(12..14) == Some(&[0x86, 0xdd]) && gateway && byte(20) == Some(58) && byte(54) == Some(136);
    let from_gateway = out.bytes.get(6..12) == Some(&GATEWAY_MAC[..]);
    hook == Hook::FROM_WORKLOAD && (arp || neighbour) && from_gateway && frame.ifindex != DEVICES.eth
}

fn is(address: &IpAddr, name: &str) -> bool {
    static NAMES: LazyLock<HashMap<IpAddr, &str>> = LazyLock::new(|| {
        ["a", "b", "c", "n1", "n2"].into_iter().flat_map(|name| addresses(name).map(|ip| (ip, name))).collect()
    });
    NAMES.get(address).is_some_and(|known| *known == name)
}

fn device(address: &IpAddr) -> Option<u32> {
    if is(address, "a") {
        Some(DEVICES.a)
    } else if is(address, "b") {
        Some(DEVICES.b)
    } else {
        None
    }
}

/// n2, and the range of its pods.
fn is_remote(address: &IpAddr) -> bool {
    let range = match address {
        IpAddr::V4(ip) => ip.octets()[..3] == [10, 0, 2],
        IpAddr::V6(ip) => ip.segments()[..4] == [0xfd00, 0, 0, 2],
    };
    range || is(address, "n2")
}

/// Neighbour, router and listener messages for the link.
fn is_on_link(kind: &Kind) -> bool {
    let link = match kind.read.dst {
        IpAddr::V6(ip) => ip.is_multicast() || ip.segments()[0] & 0xffc0 == 0xfe80,
        IpAddr::V4(_) => false,
    };
    link && kind.read.protocol == 58 && kind.icmp.is_some_and(|kind| matches!(kind, 130..=137 | 143))
}

/// Reads a frame, from its Ethernet header on.
fn parse(bytes: &[u8]) -> Option<Kind> {
    match bytes.get(12..14)? {
        [8, 0] => parse_ip(bytes.get(14..)?, false, true),
        [0x86, 0xdd] => parse_ip(bytes.get(14..)?, true, true),
        _ => None,
    }
}

fn parse_ip(packet: &[u8], v6: bool, outer: bool) -> Option<Kind> {
    let word = |at: usize| Some(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?]));
    let (src, dst, mut protocol, mut at, mut fragment): (IpAddr, IpAddr, u8, usize, _);
    if v6 {
        let address = |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?));
        (src, dst, protocol, at, fragment) = (address(8)?.into(), address(24)?.into(), *packet.get(6)?, 40, None);
        while outer && matches!(protocol, 0 | 43 | 44 | 51 | 60 | 135 | 139 | 140) {
            let (next, length) = (*packet.get(at)?, usize::from(*packet.get(at + 1)?));
            if protocol == 44 {
                let (offset, id) = (word(at + 2)?, u32::from(word(at + 4)?) << 16 | u32::from(word(at + 6)?));
                fragment = (offset & 0xfff9 != 0).then_some((id, offset & 0xfff8 != 0));
            }
            at += match protocol {
                44 => 8,
                51 => (length + 2) * 4,
                _ => (length + 1) * 8,
            };
            protocol = next;
            if fragment.is_some_and(|(_, later)| later) {
                break;
            }
        }
    } else {
        let address = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
        (src, dst, protocol, at) =
            (address(12)?.into(), address(16)?.into(), *packet.get(9)?, usize::from(packet[0] & 15) * 4);
        let offset = word(6)?;
        fragment = (outer && offset & 0x3fff != 0).then_some((u32::from(word(4)?), offset & 0x1fff != 0));
        if at < 20 {
            return None;
        }
    }
    let mut kind =
        Kind { read: Read { src, dst, protocol, sport: 0, dport: 0 }, syn: false, fragment, quotes: None, icmp: None };
    if fragment.is_some_and(|(_, later)| later) {
        return Some(kind);
    }
    match protocol {
        6 | 17 | 132 => {
            (kind.read.sport, kind.read.dport) = (word(at)?, word(at + 2)?);
            kind.syn = protocol == 6 && packet.get(at + 13).is_some_and(|flags| flags & 0x12 == 2);
        }
        1 | 58 if v6 == (protocol == 58) || !outer => {
            let message = *packet.get(at)?;
            kind.icmp = Some(message);
            match message {
                8 | 128 if (message == 128) == v6 || !outer => kind.read.sport = word(at + 4)?,
                0 | 129 if (message == 129) == v6 || !outer => kind.read.dport = word(at + 4)?,
                _ => {}
            }
            let error = if v6 { matches!(message, 1..=4) } else { matches!(message, 3 | 11 | 12) };
            if outer && error {
                kind.quotes = Some(parse_ip(packet.get(at + 8..)?, v6, false)?.read);
            }
        }
        _ => {}
    }
    Some(kind)
}
