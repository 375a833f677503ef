//! A million malformed packets through the packet path: it does not panic, and nothing passes that the
//! rules forbid, judged by a parser and a memory of connections of their own.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::LazyLock;

use cirri_abi::{GATEWAY_MAC, GATEWAY_V6, Hook, dsr};
use cirri_datapath::Verdict;
use cirri_e2e::fixtures::{ANY, Answer, Devices, EDGE, Host, Native, addresses};
use cirri_e2e::mutate::{BACKENDS, FRONTS, Mutator, tables};
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
    /// Its outer header was taken off.
    unwrapped: bool,
}

/// Remembers what it saw pass.
#[derive(Default)]
struct Oracle {
    opened: HashSet<Read>,
    /// The first fragments: as they came, and as they left.
    fragments: HashMap<(IpAddr, IpAddr, u8, u32), (Read, Read)>,
    /// Pings of services' addresses whose first fragment was answered.
    pings: HashSet<(IpAddr, IpAddr, u32)>,
}

impl Oracle {
    fn judge(&mut self, hook: u8, frame: &Frame, verdict: Verdict, out: &Frame) -> Result<(), String> {
        let to = match verdict {
            Verdict::Drop(_) => return Ok(()),
            Verdict::Local { ifindex }
            | Verdict::Device { ifindex }
            | Verdict::Up { ifindex }
            | Verdict::Neighbour { ifindex, .. } => Some(ifindex),
            Verdict::Continue => None,
        };
        if matches!(verdict, Verdict::Local { .. }) && is_gateways_answer(hook, frame, out) {
            return Ok(());
        }
        if to.is_none() && hook == EDGE {
            // It is met again behind the stack's door.
            return if frame.bytes == out.bytes { Ok(()) } else { Err("it passes, and is another".into()) };
        }
        let (edge, hook) = (hook == EDGE, if hook == EDGE { Hook::FROM_NETWORK } else { hook });
        if to.is_none() && matches!(hook, Hook::FROM_NETWORK | Hook::TO_NETWORK) {
            return self.check_stack(hook, frame, out);
        }
        let Some(kind) = unwrapped(&frame.bytes, &out.bytes) else {
            let link = frame.bytes.get(12..14).is_none_or(|kind| kind != [8, 0] && kind != [0x86, 0xdd]);
            // The node's own errors may quote too little: whatever it sends as itself leaves.
            if to.is_none() && hook == Hook::TO_OVERLAY && frame.bytes == out.bytes && is_nodes_error(frame) {
                return Ok(());
            }
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
        if self.is_echo(hook, frame, verdict, &kind, out) || is_refusal(hook, frame, verdict, &kind, out) {
            return Ok(());
        }
        let Some(after) = parse(&out.bytes) else { return Err("it became nothing".into()) };
        if out.bytes.len() > frame.bytes.len() && out.bytes.ends_with(&frame.bytes[14..]) && is_ipip(&after.read) {
            return self.check_wrapped(&kind, &after.read);
        }
        let verdict = match verdict {
            // Before the stack there is no other way to a neighbour.
            Verdict::Device { ifindex } if edge => Verdict::Neighbour { ifindex, peer: 0 },
            other => other,
        };
        self.check_ends(hook, frame, verdict, out, &kind, &after)?;
        if let Some(quoted) = after.quotes {
            return self.check_error(hook, &kind, &after, quoted, to.is_none());
        }
        self.check_policy(hook, frame, &kind, &after, to.is_none())
    }

    /// What the node gets goes through its own stack, and meets `to_workload` if it is forwarded. What the
    /// node sends is its own. Only what is a service's may change.
    fn check_stack(&mut self, hook: u8, frame: &Frame, out: &Frame) -> Result<(), String> {
        let (Some(kind), Some(after)) = (unwrapped(&frame.bytes, &out.bytes), parse(&out.bytes)) else {
            return if frame.bytes == out.bytes { Ok(()) } else { Err("it is nothing, and is another".into()) };
        };
        let same = frame.bytes == out.bytes;
        if hook == Hook::FROM_NETWORK {
            // What is for the node in a service's place will be answered in its name.
            let names = names_service(frame, true);
            // Another connection has its port, and its first packet named a service.
            let moved = moved(&kind.read, &after.read) && (names || self.opened.contains(&after.read));
            let given = is(&after.read.dst, "n1") && (!same || names);
            self.opened.extend(given.then_some(after.read));
            let served = is_front(hook, &kind.read) && is_backend(&after.read);
            if let Some((id, false)) = kind.fragment.filter(|_| served) {
                let key = (kind.read.src, kind.read.dst, kind.read.protocol, id);
                self.fragments.insert(key, (kind.read, after.read));
            }
            if kind.unwrapped {
                return self.check_unwrapped(hook, &kind, served);
            }
            let later = kind.fragment.is_some_and(|(_, later)| later);
            return if same || served || moved || later || kind.quotes.is_some() {
                Ok(())
            } else {
                Err("it is for no service, and is another".into())
            };
        }
        let knows = |read: &Read| self.opened.contains(&read.turned());
        let known = match kind.quotes {
            Some(quoted) => self.opened.contains(&quoted),
            None => knows(&kind.read) || kind.fragment.is_some(),
        };
        if same || known { Ok(()) } else { Err("it answers nothing, and is another".into()) }
    }

    /// What came in another packet, and goes to the node's stack, is for a service.
    fn check_unwrapped(&self, hook: u8, kind: &Kind, served: bool) -> Result<(), String> {
        let key = |id: u32| (kind.read.src, kind.read.dst, kind.read.protocol, id);
        let right = match (kind.quotes, kind.fragment) {
            (Some(quoted), _) => is_front(hook, &quoted.turned()),
            (None, Some((id, true))) => self.fragments.contains_key(&key(id)),
            _ => served,
        };
        if right { Ok(()) } else { Err("it came in another packet, and is for no service".into()) }
    }

    /// The reply to a ping of a service's address, or a part of it, to who asked.
    fn is_echo(&mut self, hook: u8, frame: &Frame, verdict: Verdict, kind: &Kind, out: &Frame) -> bool {
        let Some(after) = parse(&out.bytes) else { return false };
        let named = match (hook, verdict) {
            (Hook::FROM_WORKLOAD, Verdict::Local { ifindex }) => {
                ifindex == frame.ifindex && device(&kind.read.src) == Some(ifindex)
            }
            (Hook::FROM_NETWORK, Verdict::Device { ifindex }) => {
                ifindex == frame.ifindex && device(&kind.read.src).is_none() && !is(&kind.read.src, "n1")
            }
            (Hook::TO_NETWORK, Verdict::Up { ifindex }) => ifindex == frame.ifindex,
            _ => false,
        };
        let asked = ["vip", "lb"].iter().any(|name| is_at(&kind.read.dst, name)) && !kind.unwrapped;
        let (request, reply) = if kind.read.src.is_ipv4() { (8, 0) } else { (128, 129) };
        let behind = |frame: &Frame| frame.bytes[14 + if kind.read.src.is_ipv4() { 20 } else { 40 }..].to_vec();
        let part = |id| (kind.read.src, kind.read.dst, id);
        let kinds = match kind.fragment {
            Some((id, true)) => self.pings.contains(&part(id)) && behind(frame) == behind(out),
            _ => kind.icmp == Some(request) && after.icmp == Some(reply),
        };
        let back =
            (after.read.src, after.read.dst, after.read.dport) == (kind.read.dst, kind.read.src, kind.read.sport);
        let right = named && asked && kinds && back && frame.bytes.len() == out.bytes.len();
        if let Some((id, false)) = kind.fragment.filter(|_| right) {
            self.pings.insert(part(id));
        }
        right
    }

    /// In IPIP to a backend: a service's, or an error about it.
    fn check_wrapped(&mut self, kind: &Kind, outer: &Read) -> Result<(), String> {
        let known = match kind.quotes {
            Some(quoted) => self.opened.contains(&quoted.turned()),
            None => is_at(&kind.read.dst, "lb") && (kind.read.dport == 443 || kind.fragment.is_some()),
        };
        if !known || !BACKENDS.iter().any(|(name, _)| is_at(&outer.dst, name)) || !is(&outer.src, "n1") {
            return Err("it is in IPIP, and of no service with it".into());
        }
        self.opened.insert(kind.read);
        Ok(())
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
                let own = if frame.ifindex == DEVICES.a { 300 } else { 400 };
                let (peer, identity) = out.tunnel_to.unwrap_or_default();
                // Others' packets that are handed on, and answers in the node's name, are a service's.
                let handed_on = hook != Hook::FROM_WORKLOAD || (identity == 1 && kind.read.src != after.read.src);
                let right = peer == u32::from_ne_bytes([192, 168, 0, 2]) && (identity == own || handed_on);
                let remote = is_remote(&after.read.dst);
                if right && remote { Ok(()) } else { Err(format!("the tunnel is wrong: {:?}", out.tunnel_to)) }
            }
            Verdict::Neighbour { .. }
                if (is_remote(&after.read.dst) && !is(&after.read.dst, "n2")) || device(&after.read.dst).is_some() =>
            {
                Err("it leaves for an address of the cluster".into())
            }
            Verdict::Continue if hook == Hook::FROM_WORKLOAD && !is(&after.read.dst, "n1") => {
                Err("it is handed to the node, but is for another".into())
            }
            Verdict::Continue if hook == Hook::FROM_OVERLAY && !is(&after.read.dst, "n1") => {
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
    fn check_error(&self, hook: u8, kind: &Kind, after: &Kind, quoted: Read, continues: bool) -> Result<(), String> {
        if kind.unwrapped && !kind.quotes.is_some_and(|quoted| is_front(hook, &quoted.turned())) {
            return Err("the error came in another packet, and is about no service".into());
        }
        let own = is(&after.read.src, "n1") || is(&after.read.dst, "n1");
        if continues && own && hook != Hook::FROM_NETWORK {
            return Ok(());
        }
        if quoted.src != after.read.dst {
            return Err("the error is for another than the sender".into());
        }
        // Either end may know the connection by other addresses than the other.
        let mut forms = [Some(quoted), kind.quotes].into_iter().flatten();
        let known = forms.any(|quoted| self.opened.contains(&quoted) || self.opened.contains(&quoted.turned()));
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
            // For the node itself, as `check_ends` saw. Its stack may answer for a service.
            self.opened.insert(after.read);
            return Ok(());
        }
        let (mut came, mut left) = (kind.read, after.read);
        if let Some((id, later)) = kind.fragment {
            let key = (came.src, came.dst, came.protocol, id);
            if later {
                let Some(first) = self.fragments.get(&key) else {
                    // The node's stack may have got the first, or it had no hop left.
                    let front = ["n1", "lb"].iter().any(|name| is_at(&came.dst, name));
                    let backend = BACKENDS.iter().any(|(name, _)| is_at(&left.dst, name));
                    let served = hook == Hook::FROM_NETWORK && front && backend;
                    return if served { Ok(()) } else { Err("its first fragment did not pass".into()) };
                };
                if first.1.dst != left.dst {
                    return Err("its first fragment went elsewhere".into());
                }
                (came, left) = *first;
            } else {
                self.fragments.insert(key, (came, left));
            }
        }
        // Out of a workload it is known by the addresses that it came with, elsewhere by those that it has;
        // what is for a service is judged by its sender and by the backend.
        // What somebody there began is no service's.
        let began = left == came && !kind.syn && self.opened.contains(&came.turned());
        let front = is_front(hook, &came) && !began;
        if kind.unwrapped && !front {
            return Err("it came in another packet, and is for no service".into());
        }
        let mut read = if hook == Hook::FROM_WORKLOAD { came } else { left };
        if front && !kind.unwrapped {
            read = Read { dst: left.dst, dport: left.dport, ..came };
            if !is_backend(&left) {
                return Err("it is for a service, and goes to none of its backends".into());
            }
            if hook == Hook::FROM_NETWORK && is_at(&came.dst, "vip") && !is(&came.src, "n2") {
                return Err("it is for an address of the cluster, and from outside".into());
            }
        }
        let by_option = hook == Hook::FROM_OVERLAY && matches!(came.protocol, 6 | 17) && names_service(frame, false);
        let sender = match frame.tunnel {
            Some(key) if hook == Hook::FROM_OVERLAY && !by_option => Some(if key.vni == 1 { 6 } else { key.vni }),
            _ => None,
        };
        let forms = if hook == Hook::FROM_WORKLOAD { [came, came] } else { [came, left] };
        let answers = !front && !kind.syn && forms.iter().any(|read| self.opened.contains(&read.turned()));
        if self.opened.contains(&read) || answers {
            // It may have got another port than last time: of a service's address, or of its own.
            self.opened.extend((front || moved(&came, &left)).then_some(left));
            return Ok(());
        }
        if hook == Hook::FROM_OVERLAY {
            let peer = frame.tunnel.is_some_and(|key| key.remote == u32::from_ne_bytes([192, 168, 0, 2]));
            let remote = is_remote(&came.src) && frame.tunnel.is_some_and(|key| key.vni != 0);
            let outside = by_option && !is_remote(&came.src) && device(&came.src).is_none() && !is(&came.src, "n1");
            if !peer || !(remote || outside) {
                return Err("the overlay does not vouch for it".into());
            }
        }
        if hook == Hook::FROM_NETWORK && !front && device(&left.dst).is_none() {
            return Err("it is for no service, and is handed on".into());
        }
        if !allowed(&read, sender) {
            return Err(format!("no rule allows {read:?} ({:?})", kind.icmp));
        }
        self.opened.extend([read, left]);
        Ok(())
    }
}

/// Whether a packet leaves with another port of its sender than it came with, and is else the same.
fn moved(came: &Read, left: &Read) -> bool {
    left != came && Read { sport: came.sport, ..*left } == *came
}

/// Whether something is for a service, where it was met.
fn is_front(hook: u8, read: &Read) -> bool {
    let node = |address| match hook {
        Hook::FROM_WORKLOAD => is(address, "n1") || is(address, "n2"),
        _ => is(address, "n1"),
    };
    matches!(read.protocol, 6 | 17)
        && FRONTS.iter().any(|(name, port)| {
            let there =
                if *name == ANY { node(&read.dst) } else { hook != Hook::FROM_OVERLAY && is_at(&read.dst, name) };
            there && *port == read.dport
        })
}

/// Whether something is for one of the backends.
fn is_backend(read: &Read) -> bool {
    BACKENDS.iter().any(|(name, port)| is_at(&read.dst, name) && *port == read.dport)
}

fn is_at(address: &IpAddr, name: &str) -> bool {
    addresses(name).contains(address)
}

fn is_ipip(read: &Read) -> bool {
    matches!(read.protocol, dsr::IPIP | dsr::IPV6)
}

/// The packet, without the outer header that it came in and left without.
fn unwrapped(bytes: &[u8], out: &[u8]) -> Option<Kind> {
    let kind = parse(bytes)?;
    let header = if kind.read.src.is_ipv4() { 34 } else { 54 };
    let plain = parse(out).is_none_or(|out| !is_ipip(&out.read));
    let here = device(&kind.read.dst).is_some() || is(&kind.read.dst, "n1");
    if !is_ipip(&kind.read) || !plain || !here {
        return Some(kind);
    }
    let inner = [&bytes[..14], bytes.get(header..)?].concat();
    Some(Kind { unwrapped: true, ..parse(&inner)? })
}

/// Whether a frame carries the option that names a service with it: in the first header, where nodes put
/// it, or, if `anywhere`, behind others.
fn names_service(frame: &Frame, anywhere: bool) -> bool {
    let [IpAddr::V4(four), IpAddr::V6(six)] = addresses("lb") else { return false };
    let option4 = [&[dsr::OPTION_V4, 8, 0, 80][..], &four.octets()].concat();
    let option6 = [&[dsr::OPTION_V6, 20][..], &six.octets(), &[0, 80]].concat();
    let first = frame.bytes.get(20) == Some(&60) && frame.bytes.get(56..76) == Some(&option6);
    let behind = anywhere && frame.bytes.windows(20).any(|bytes| bytes == option6);
    frame.bytes.get(34..42) == Some(&option4) || first || behind
}

/// A reset, or an ICMP error, to the sender of what nobody serves or what is too big, from whom it asked.
fn is_refusal(hook: u8, frame: &Frame, verdict: Verdict, kind: &Kind, out: &Frame) -> bool {
    // What it quotes may be cut off.
    let Some(after) = out.bytes.get(14..).and_then(|packet| parse_ip(packet, !kind.read.src.is_ipv4(), false)) else {
        return false;
    };
    let back = match verdict {
        Verdict::Local { ifindex } => hook == Hook::FROM_WORKLOAD && ifindex == frame.ifindex,
        Verdict::Device { ifindex } => hook == Hook::FROM_NETWORK && ifindex == frame.ifindex,
        // Of what the node sends only datagrams are told so; connections in the system call.
        Verdict::Up { ifindex } => {
            hook == Hook::TO_NETWORK
                && ifindex == frame.ifindex
                && kind.read.protocol == 17
                && !is_front(hook, &kind.read)
        }
        _ => false,
    };
    let named = match hook {
        Hook::FROM_WORKLOAD => device(&kind.read.src) == Some(frame.ifindex),
        Hook::TO_NETWORK => true,
        _ => device(&kind.read.src).is_none() && !is(&kind.read.src, "n1"),
    };
    let asked = ["vip", "lb"].iter().any(|name| is_at(&kind.read.dst, name));
    let served = is_front(hook, &kind.read);
    let said = if after.read.protocol == 6 {
        !served && (after.read.sport, after.read.dport) == (kind.read.dport, kind.read.sport)
    } else {
        after.icmp.is_some() && (!served || is_at(&kind.read.dst, "lb"))
    };
    back && named && asked && said && (after.read.src, after.read.dst) == (kind.read.dst, kind.read.src)
}

/// An ICMP message that says that it is from the node, whatever it quotes.
fn is_nodes_error(frame: &Frame) -> bool {
    let v6 = frame.bytes.get(12..14) == Some(&[0x86, 0xdd]);
    let read = frame.bytes.get(14..).and_then(|packet| parse_ip(packet, v6, false));
    read.is_some_and(|kind| kind.icmp.is_some() && is(&kind.read.src, "n1"))
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
    let mut kind = Kind {
        read: Read { src, dst, protocol, sport: 0, dport: 0 },
        syn: false,
        fragment,
        quotes: None,
        icmp: None,
        unwrapped: false,
    };
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
