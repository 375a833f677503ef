//! The packet path in the kernel as a host of fixtures: the loaded programs under
//! `BPF_PROG_TEST_RUN`, in a namespace with real devices and routes. Needs root.
//!
//! A tunnel key cannot be given to a test run. Packets out of the overlay therefore go through a real
//! overlay device: they are sent as VXLAN from another namespace, as a peer would send them.

use std::future::poll_fn;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::pin::pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use aya::TestRun;
use aya::programs::{ProgramError, TestRunOptions};
use cirri_abi::{
    Affinity, Backend, BackendCounter, Counter, FlowEvent, Hook, NodeConfig, Recipe, ServiceSlot, SnatPool, Tick,
    Tuple, VXLAN_PORT,
};
use cirri_datapath::Table;
use cirri_e2e::fixtures::{Answer, BACKENDS, Change, Devices, EDGE, Host, NODE_MAC, Output, ROUTES, UNWRAP, WIRE_MAC};
use cirri_e2e::kernel::{TestInstance, TestNamespace};
use cirri_loader::net::{Address, Namespace, Neighbour, Net, Route, VethEnd};
use cirri_loader::{Datapath, Events, Tables};
use cirri_sim::{Frame, build};
use tokio::runtime::Runtime;

/// Of packets that a hook has decided on; see `skb.rs` of the programs.
const MARK_DECIDED: u32 = 0x0400;
const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 0, 1);
/// Peers that speak VXLAN: n2, and a node that is nobody's.
const PEERS: [Ipv4Addr; 2] = [Ipv4Addr::new(192, 168, 0, 2), Ipv4Addr::new(192, 168, 0, 3)];
/// Workloads.
const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];
/// Ports of the packet that follows another through the overlay, to know when that is done.
const MARKER: u16 = 9;
const IN_TIME: Duration = Duration::from_secs(5);

/// The packet path in the kernel.
pub struct Kernel {
    datapath: Datapath,
    tables: Tables,
    events: Events,
    runtime: Runtime,
    /// The real devices.
    pub devices: Devices,
    /// Those of five workloads; a's and b's are the first.
    pub workloads: [u32; 5],
    wire: Namespace,
    sockets: Vec<UdpSocket>,
    /// Events that came with others.
    seen: Vec<FlowEvent>,
    /// What the markers counted.
    marked: Vec<Counter>,
    /// Changes to arrays.
    written: Vec<Change>,
}

/// Runs a test on the kernel, in a namespace of its own.
pub fn on_kernel(test: impl FnOnce(&mut Kernel) + Send) {
    let (node, wire) = (TestNamespace::new(), TestNamespace::new());
    let instance = TestInstance::new();
    let inside = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let (devices, workloads) = runtime.block_on(async { devices(&node.net(), &wire).await });
        let mut datapath = instance.load();
        datapath.attach_overlay("cirri_vxlan").expect("attached");
        let entered = runtime.enter();
        let events = datapath.events().expect("opened").expect("the first reader");
        drop(entered);
        let bind = |ip| wire.namespace.run(|| UdpSocket::bind((ip, 0))).expect("entered").expect("bound");
        let tables = datapath.tables().clone();
        let marked = vec![Counter::default(); tables.counters().expect("read").len()];
        let sockets = PEERS.map(bind).into();
        let (wire, seen) = (wire.namespace.clone(), Vec::new());
        let written = Vec::new();
        test(&mut Kernel {
            datapath,
            tables,
            events,
            runtime,
            devices,
            workloads,
            wire,
            sockets,
            seen,
            marked,
            written,
        });
    };
    node.namespace.run(inside).expect("entered");
}

impl Kernel {
    /// Empties all tables but those of rule sets: the kernel waits long for each that goes, and every
    /// world installs its own.
    pub fn reset(&mut self) {
        let t = &self.tables;
        let keys = |all: Vec<(_, Recipe)>| all.into_iter().map(|(key, _)| key).collect::<Vec<_>>();
        for table in [&t.flows4, &t.pending4] {
            table.delete_all(&keys(table.entries().expect("listed"))).expect("deleted");
        }
        let keys = |all: Vec<(Tuple, Recipe)>| all.into_iter().map(|(key, _)| key).collect::<Vec<_>>();
        for table in [&t.flows6, &t.pending6] {
            table.delete_all(&keys(table.entries().expect("listed"))).expect("deleted");
        }
        for (key, _) in t.fragments.entries().expect("listed") {
            t.fragments.delete(&key).expect("deleted");
        }
        for (key, _) in t.endpoints.entries().expect("listed") {
            t.endpoints.delete(&key).expect("deleted");
        }
        for (key, _) in t.devices.entries().expect("listed") {
            t.devices.delete(&key).expect("deleted");
        }
        for (key, _) in t.ipcache.entries().expect("listed") {
            t.ipcache.delete(&key).expect("deleted");
        }
        for (key, _) in t.services.entries().expect("listed") {
            t.services.delete(&key).expect("deleted");
        }
        for (key, _) in t.affinity.entries().expect("listed") {
            t.affinity.delete(&key).expect("deleted");
        }
        for (key, _) in t.source_ranges.entries().expect("listed") {
            t.source_ranges.delete(&key).expect("deleted");
        }
        // Places of an array stay: those that were written are emptied.
        for change in self.written.drain(..) {
            match change {
                Change::Backend(number, _) => t.backends.put(&number, &Backend::default()).expect("written"),
                Change::Slots(first, backends) => {
                    for slot in (first..).take(backends.len()) {
                        t.slots.put(&slot, &ServiceSlot::default()).expect("written");
                    }
                }
                Change::Pool(number, _) => t.snat_pools.put(&number, &SnatPool::default()).expect("written"),
                Change::Identities(word, _) => t.identities.put(&word, &0).expect("written"),
                Change::Writing(_) => t.set_writing(None).expect("written"),
                Change::NodePort(port) => t.node_ports.put(&(u32::from(port) / 64), &0).expect("written"),
                _ => {}
            }
        }
        t.set_node(&NodeConfig::default()).expect("written");
        self.events();
    }

    /// Makes everything in the tables older: nobody waits for the kernel's clock.
    fn age(&self, ticks: u32) {
        let earlier = |tick: Tick| Tick { count: tick.count.wrapping_sub(ticks) };
        let older = |recipe: Recipe| {
            let (since, last_seen) = (earlier(recipe.since), earlier(recipe.last_seen));
            Recipe { since, last_seen, ..recipe }
        };
        let t = &self.tables;
        for table in [&t.flows4, &t.pending4] {
            for (key, recipe) in table.entries().expect("listed") {
                table.put(&key, &older(recipe)).expect("written");
            }
        }
        for table in [&t.flows6, &t.pending6] {
            for (key, recipe) in table.entries().expect("listed") {
                table.put(&key, &older(recipe)).expect("written");
            }
        }
        let since = t.epoch(cirri_abi::epoch_slot::WRITING).expect("read");
        if since != 0 {
            t.set_writing(Some(Tick { count: since.wrapping_sub(ticks) })).expect("written");
        }
        for (key, kept) in t.affinity.entries().expect("listed") {
            let last_used = earlier(kept.last_used);
            t.affinity.put(&key, &Affinity { last_used, ..kept }).expect("written");
        }
    }

    /// Through the program before the stack.
    fn edge_run(&mut self, frame: &Frame) -> Option<Output> {
        // `struct xdp_md`: the frame from 0 to its length, the device it came in by, the first queue.
        let words = [0, frame.bytes.len() as u32, 0, frame.ifindex, 0, 0];
        let context: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let mut out = vec![0; 4096];
        let options = TestRunOptions {
            data_in: Some(&frame.bytes),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ..TestRunOptions::default()
        };
        let program = self.datapath.edge_mut().expect("it is there");
        let result = match program.test_run(options) {
            Ok(result) => result,
            // The kernel makes no frame of too few bytes.
            Err(ProgramError::SyscallError(error)) if error.io_error.kind() == ErrorKind::InvalidInput => return None,
            Err(error) => panic!("edge does not run on {frame:?}: {error}"),
        };
        out.truncate(result.data_size_out as usize);
        let frame = Frame { bytes: out, ifindex: frame.ifindex, ..Frame::default() };
        Some(Output { answer: Answer::Edge(result.return_value), frame: Some(frame) })
    }

    fn test_run(&mut self, program: &str, frame: &Frame) -> Option<Output> {
        let mut context = [0u8; 192];
        context[8..12].copy_from_slice(&(if frame.decided { MARK_DECIDED } else { 0 }).to_ne_bytes());
        context[40..44].copy_from_slice(&frame.ifindex.to_ne_bytes());
        let (mut out, mut context_out) = (vec![0; 4096], [0u8; 192]);
        let options = TestRunOptions {
            data_in: Some(&frame.bytes),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ctx_out: Some(&mut context_out),
            ..TestRunOptions::default()
        };
        let result = match self.datapath.program_mut(program).expect("it is there").test_run(options) {
            Ok(result) => result,
            // The kernel makes no packet of too few bytes.
            Err(ProgramError::SyscallError(error)) if error.io_error.kind() == ErrorKind::InvalidInput => return None,
            Err(error) => panic!("{program} does not run on {frame:?}: {error}"),
        };
        out.truncate(result.data_size_out as usize);
        let decided = context_out[8..12] == MARK_DECIDED.to_ne_bytes();
        let frame = Frame { bytes: out, ifindex: frame.ifindex, decided, ..Frame::default() };
        Some(Output { answer: Answer::Code(result.return_value), frame: Some(frame) })
    }

    /// Sends it as VXLAN from the peer that it names, and another after it that is always dropped
    /// and reported: when that report is there, the packet has been through.
    fn through_overlay(&mut self, frame: &Frame) -> Option<Output> {
        let key = frame.tunnel?;
        let peer = Ipv4Addr::from(key.remote.to_ne_bytes());
        let socket = &self.sockets[PEERS.iter().position(|known| *known == peer)?];
        let before = self.received();
        let send = |bytes: &[u8], vni: u32| {
            let mut packet = vec![8, 0, 0, 0];
            packet.extend((vni << 8).to_be_bytes());
            packet.extend(bytes);
            socket.send_to(&packet, (NODE, VXLAN_PORT)).expect("sent");
        };
        send(&frame.bytes, key.vni);
        let outside = |last| IpAddr::from([198, 18, 0, last]);
        let marker = build::udp((outside(1), MARKER), (outside(2), MARKER)).on(0);
        send(&marker.bytes, 1);
        let deadline = Instant::now() + IN_TIME;
        loop {
            self.collect();
            if let Some(at) = self.seen.iter().position(|event| event.tuple.sport.number() == MARKER) {
                let event = self.seen.remove(at);
                let index = cirri_abi::CounterIndex::reason(event.reason, event.direction) as usize;
                self.marked[index].packets += 1;
                self.marked[index].bytes += u64::from(event.length);
                break;
            }
            assert!(Instant::now() < deadline, "nothing comes through the overlay device");
            std::thread::yield_now();
        }
        let after = self.received();
        let delivered = std::array::from_fn(|i| (before[i].0, after[i].1 - before[i].1));
        Some(Output { answer: Answer::Delivered(delivered), frame: None })
    }

    /// Packets that came out in each workload.
    fn received(&self) -> [(u32, u64); 5] {
        let table = self.wire.run(|| std::fs::read_to_string("/proc/thread-self/net/dev")).expect("entered");
        let table = table.expect("read");
        let of = |name: &str| {
            let line = table.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(':'));
            let line = line.expect("the device is there");
            line.split_whitespace().nth(1).and_then(|packets| packets.parse().ok()).expect("a number")
        };
        std::array::from_fn(|i| (self.workloads[i], of(&format!("in-{}", NAMES[i]))))
    }

    fn collect(&mut self) {
        loop {
            let mut next = pin!(self.events.next());
            // Looked at once: a time-out of zero would still wait for the clock's next millisecond.
            let batch = self.runtime.block_on(poll_fn(|context| match next.as_mut().poll(context) {
                Poll::Ready(batch) => Poll::Ready(Some(batch)),
                Poll::Pending => Poll::Ready(None),
            }));
            match batch {
                Some(batch) => self.seen.extend(batch.expect("read").events),
                None => return,
            }
        }
    }
}

impl Host for Kernel {
    fn name(&self) -> &'static str {
        "kernel"
    }

    fn change(&mut self, change: &Change) {
        self.written.push(change.clone());
        let t = &self.tables;
        match change {
            Change::Config(config) => {
                t.set_node(config).expect("written");
                t.bump(cirri_abi::epoch_slot::NODE).expect("moved");
            }
            Change::Endpoint(endpoint) => {
                t.devices.put(&endpoint.ifindex, endpoint).expect("written");
                for address in [endpoint.v4, endpoint.v6] {
                    if address != cirri_abi::Addr::UNSPECIFIED {
                        t.endpoints.put(&address, endpoint).expect("written");
                    }
                }
                t.bump(endpoint.ruleset).expect("moved");
            }
            Change::NoEndpoint(ifindex) => {
                let endpoint = t.devices.get(ifindex).expect("read").expect("there");
                t.devices.delete(ifindex).expect("deleted");
                for address in [endpoint.v4, endpoint.v6] {
                    t.endpoints.delete(&address).expect("deleted");
                }
                t.bump(endpoint.ruleset).expect("moved");
            }
            Change::Ipcache(key, entry) => t.ipcache.put(key, entry).expect("written"),
            Change::NoIpcache(key) => assert!(t.ipcache.delete(key).expect("deleted")),
            Change::Ruleset(slot, entries) => drop(t.install_ruleset(*slot, entries).expect("installed")),
            Change::Bump(slot) => drop(t.bump(*slot).expect("moved")),
            Change::Later(ticks) => self.age(*ticks),
            Change::Service(key, service) => t.services.put(key, service).expect("written"),
            Change::NoService(key) => assert!(t.services.delete(key).expect("deleted")),
            Change::Backend(number, backend) => t.backends.put(number, backend).expect("written"),
            Change::Slots(first, backends) => {
                for (slot, backend) in (*first..).zip(backends) {
                    t.slots.put(&slot, &ServiceSlot { backend: *backend }).expect("written");
                }
            }
            Change::Range(key) => t.source_ranges.put(key, &0).expect("written"),
            Change::Pool(number, pool) => t.snat_pools.put(number, pool).expect("written"),
            Change::NodePort(port) => {
                let (word, bit) = (u32::from(*port) / 64, 1u64 << (port % 64));
                let bits = t.node_ports.get(&word).expect("read").unwrap_or_default();
                t.node_ports.put(&word, &(bits | bit)).expect("written");
            }
            Change::Identities(word, bits) => t.identities.put(word, bits).expect("written"),
            Change::Writing(writing) => t.set_writing(writing.then(cirri_loader::gc::now)).expect("written"),
        }
    }

    fn packet(&mut self, hook: u8, frame: &Frame) -> Option<Output> {
        if frame.tagged {
            // A test run of a program cannot be given a tag.
            return None;
        }
        let program = match hook {
            Hook::FROM_WORKLOAD => "from_workload",
            Hook::TO_WORKLOAD => "to_workload",
            Hook::FROM_NETWORK => "from_network",
            Hook::TO_NETWORK => "to_network",
            EDGE => return self.edge_run(frame),
            UNWRAP => "unwrap",
            Hook::TO_OVERLAY => "to_overlay",
            _ if frame.tunnel.is_none() => "from_overlay",
            _ => return self.through_overlay(frame),
        };
        self.test_run(program, frame)
    }

    fn flows(&self) -> Vec<(Table, Tuple, Recipe)> {
        let t = &self.tables;
        let mut all = Vec::new();
        for (table, four, six) in [(Table::Flows, &t.flows4, &t.flows6), (Table::Pending, &t.pending4, &t.pending6)] {
            let four = four.entries().expect("listed").into_iter().map(|(key, recipe)| (key.tuple(), recipe));
            let six = six.entries().expect("listed").into_iter();
            all.extend(four.chain(six).map(|(tuple, recipe)| (table, tuple, recipe)));
        }
        all
    }

    fn counters(&self) -> Vec<Counter> {
        let all = self.tables.counters().expect("read");
        let without = |(all, marked): (Counter, &Counter)| Counter {
            packets: all.packets - marked.packets,
            bytes: all.bytes - marked.bytes,
        };
        all.into_iter().zip(&self.marked).map(without).collect()
    }

    fn backends(&self) -> Vec<BackendCounter> {
        let all = self.tables.backend_counters(0..BACKENDS).expect("read");
        all.into_iter().map(|(_, counter)| counter).collect()
    }

    fn events(&mut self) -> Vec<FlowEvent> {
        self.collect();
        std::mem::take(&mut self.seen)
    }
}

/// Devices of the node, and what is at their other ends.
async fn devices(node: &Net, wire: &TestNamespace) -> (Devices, [u32; 5]) {
    let other = wire.net();
    let workloads = NAMES.map(|name| (format!("lxc-{name}"), format!("in-{name}"), cirri_abi::GATEWAY_MAC, None));
    let network = ("eth".to_owned(), "peer".to_owned(), NODE_MAC, Some(WIRE_MAC));
    for (name, peer, mac, peer_mac) in workloads.iter().chain([&network]) {
        let end = VethEnd { name: name.clone(), mac: Some(*mac), ..VethEnd::default() };
        let namespace = Some(wire.namespace.clone());
        let inside = VethEnd { name: peer.clone(), mac: *peer_mac, namespace, ..VethEnd::default() };
        node.create_veth(&end, &inside).await.expect("made");
        // Nothing comes out of the devices but what the test sends: no link-local chatter.
        other.set_sysctl(&format!("ipv6/conf/{peer}/disable_ipv6"), "1").expect("written");
        if name != "eth" {
            node.set_sysctl(&format!("ipv6/conf/{name}/disable_ipv6"), "1").expect("written");
        }
        node.set_up(name).await.expect("up");
        other.set_up(peer).await.expect("up");
    }
    node.create_vxlan("cirri_vxlan", VXLAN_PORT, 1450).await.expect("made");
    node.set_up("cirri_vxlan").await.expect("up");
    let eth = node.link("eth").await.expect("there").index;
    for (ip, prefix) in [("192.168.0.1", 24), ("fd01::1", 64)] {
        let ip = ip.parse().expect("an address");
        node.add_address(&Address { ip, prefix, device: eth }).await.expect("added");
    }
    for family in ["ipv4", "ipv6"] {
        node.set_sysctl(&format!("{family}/conf/all/forwarding"), "1").expect("written");
    }
    for (to, via) in ROUTES {
        let to: ipnet::IpNet = to.parse().expect("a network");
        let via: IpAddr = via.parse().expect("an address");
        if to.addr() != via {
            let via = Some(via);
            let route = Route { to: to.addr(), prefix: to.prefix_len(), via, device: eth, source: None, onlink: true };
            node.put_route(&route).await.expect("added");
        }
    }
    let peer = other.link("peer").await.expect("there").index;
    for ip in PEERS {
        other.add_address(&Address { ip: ip.into(), prefix: 24, device: peer }).await.expect("added");
        node.put_neighbour(&Neighbour { ip: ip.into(), mac: WIRE_MAC, device: eth }).await.expect("added");
    }
    other.put_neighbour(&Neighbour { ip: NODE.into(), mac: NODE_MAC, device: peer }).await.expect("added");
    for ip in ["192.168.0.254", "fd01::fe", "fd01::2"] {
        let ip = ip.parse().expect("an address");
        node.put_neighbour(&Neighbour { ip, mac: WIRE_MAC, device: eth }).await.expect("added");
    }
    let overlay = node.link("cirri_vxlan").await.expect("there").index;
    let mut numbers = [0; 5];
    for (number, (name, ..)) in numbers.iter_mut().zip(&workloads) {
        *number = node.link(name).await.expect("there").index;
    }
    (Devices { a: numbers[0], b: numbers[1], eth, overlay }, numbers)
}
