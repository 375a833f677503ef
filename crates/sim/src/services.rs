//! Services of a simulated node: what user space writes, and sockets.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};

use cirri_abi::{
    Addr, Affinity, AffinityKey, Backend, BackendCounter, Ipcache, NodeConfig, Port, RangeKey, Service, ServiceKey,
    SnatPool, SocketServices, Tick,
};
use cirri_datapath::{Attempt, Services, Socket, SocketVerdict, bind, reach, restore};

use crate::node::Node;
use crate::prefix::{Prefixes, cut};

/// The tables of services.
#[derive(Default)]
pub struct ServiceTables {
    services: HashMap<ServiceKey, Service>,
    backends: HashMap<u32, Backend>,
    slots: HashMap<u32, u32>,
    ranges: Prefixes<[u8; 20], ()>,
    pub(crate) pools: HashMap<u32, SnatPool>,
    node_ports: HashSet<u16>,
    per_packet: HashSet<u64>,
    pub(crate) edge_devices: HashMap<u32, u32>,
    affinity: RefCell<HashMap<AffinityKey, Affinity>>,
    pub(crate) counters: RefCell<HashMap<u32, BackendCounter>>,
    random: Cell<u32>,
}

/// A socket of a simulated program: the address that its call names, and its storage.
#[derive(Clone, Debug, Default)]
pub struct SimSocket {
    /// The address that the call names or is told.
    pub addr: Addr,
    /// Its port.
    pub port: Port,
    /// IP protocol.
    pub protocol: u8,
    /// Cookie of its network namespace.
    pub netns: u64,
    /// Its storage.
    pub services: Option<SocketServices>,
    per_packet: bool,
}

impl Node {
    /// Serves an address. The caller bumps the service's epoch.
    pub fn put_service(&mut self, key: ServiceKey, service: Service) {
        self.services.services.insert(key, service);
    }

    /// Serves it no more.
    pub fn remove_service(&mut self, key: &ServiceKey) {
        self.services.services.remove(key);
    }

    /// Says who is behind a number; [`Backend::default`] for nobody.
    pub fn put_backend(&mut self, number: u32, backend: Backend) {
        self.services.backends.insert(number, backend);
    }

    /// Fills slots from `first` on.
    pub fn put_slots(&mut self, first: u32, backends: &[u32]) {
        for (index, backend) in (first..).zip(backends) {
            self.services.slots.insert(index, *backend);
        }
    }

    /// Names a range of clients for a service.
    pub fn put_range(&mut self, key: RangeKey) {
        let bytes = range_bytes(key.service, &key.addr);
        self.services.ranges.insert(key.prefix_len, cut(bytes, key.prefix_len), ());
    }

    /// A pool of sources.
    pub fn put_pool(&mut self, number: u32, pool: SnatPool) {
        self.services.pools.insert(number, pool);
    }

    /// Says that a service may be behind a port of the node.
    pub fn put_node_port(&mut self, port: Port) {
        self.services.node_ports.insert(port.be);
    }

    /// Says that a namespace's packets are translated and not its sockets.
    pub fn set_per_packet(&mut self, netns: u64) {
        self.services.per_packet.insert(netns);
    }

    /// Says that a device takes frames before the stack, and its Ethernet address.
    pub fn put_edge_device(&mut self, ifindex: u32, mac: [u8; 6]) {
        self.services.edge_devices.insert(ifindex, u32::from_ne_bytes([mac[2], mac[3], mac[4], mac[5]]));
    }

    /// What a backend has been given.
    pub fn backend_counter(&self, number: u32) -> BackendCounter {
        self.services.counters.borrow().get(&number).copied().unwrap_or_default()
    }

    /// A program calls `connect`, or `sendmsg` with an address.
    pub fn reach(&self, attempt: Attempt, socket: &mut SimSocket) -> SocketVerdict {
        socket.per_packet = self.services.per_packet.contains(&socket.netns);
        reach(attempt, socket, self)
    }

    /// A program is told an address.
    pub fn restore(&self, socket: &mut SimSocket) {
        restore(socket);
    }

    /// A program calls `bind`; whether it may.
    pub fn bind(&self, socket: &mut SimSocket) -> bool {
        bind(socket, self)
    }
}

impl Services for Node {
    fn service(&self, key: &ServiceKey) -> Option<&Service> {
        self.services.services.get(key)
    }

    fn backend(&self, number: u32) -> Option<&Backend> {
        // The kernel's is an array: what nobody wrote is there, and absent.
        static NOBODY: Backend =
            Backend { addr: Addr::UNSPECIFIED, port: Port { be: 0 }, proto: 0, state: 0, service: 0, _pad: [0; 2] };
        Some(self.services.backends.get(&number).unwrap_or(&NOBODY))
    }

    fn service_slot(&self, index: u32) -> u32 {
        self.services.slots.get(&index).copied().unwrap_or_default()
    }

    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        self.services.affinity.borrow().get(key).copied()
    }

    fn keep_affinity(&self, key: &AffinityKey, affinity: &Affinity) {
        self.services.affinity.borrow_mut().insert(*key, *affinity);
    }

    fn in_range(&self, service: u32, addr: &Addr) -> bool {
        let bytes = range_bytes(service, addr);
        self.services.ranges.longest(|length| cut(bytes, length)).is_some()
    }

    fn node_port(&self, port: Port) -> bool {
        self.services.node_ports.contains(&port.be)
    }

    fn ipcache(&self, addr: &Addr) -> Option<&Ipcache> {
        let bytes = addr.octets();
        self.ipcache.longest(|length| cut(bytes, length))
    }

    fn node(&self) -> Option<&NodeConfig> {
        Some(&self.config)
    }

    fn now(&self) -> Tick {
        Tick::from_ns(self.now_ns.get())
    }

    fn random(&self) -> u32 {
        // xorshift: any spread will do here, and tests want the same one each time.
        let mut x = match self.services.random.get() {
            0 => 0x9e37_79b9,
            x => x,
        };
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        self.services.random.set(x);
        x
    }

    fn count_connection(&self, backend: u32) {
        self.services.counters.borrow_mut().entry(backend).or_default().connections += 1;
    }
}

impl Socket for SimSocket {
    fn address(&self) -> Addr {
        self.addr
    }

    fn port(&self) -> Port {
        self.port
    }

    fn set(&mut self, addr: &Addr, port: Port) {
        self.addr = *addr;
        self.port = port;
    }

    fn protocol(&self) -> u8 {
        self.protocol
    }

    fn netns_cookie(&self) -> u64 {
        self.netns
    }

    fn is_per_packet(&self, _cookie: u64) -> bool {
        self.per_packet
    }

    fn services(&mut self) -> Option<&mut SocketServices> {
        self.services.as_mut()
    }

    fn services_or_new(&mut self) -> Option<&mut SocketServices> {
        Some(self.services.get_or_insert_default())
    }
}

fn range_bytes(service: u32, addr: &Addr) -> [u8; 20] {
    let mut bytes = [0; 20];
    bytes[..4].copy_from_slice(&service.to_ne_bytes());
    bytes[4..].copy_from_slice(&addr.octets());
    bytes
}
