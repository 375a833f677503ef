//! The file that says what is balanced to whom: types and defaults. What types cannot say is checked
//! where the file becomes a [`super::plan::Plan`].

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, de};
use serde_saphyr::Spanned;

use crate::config::{Acceleration, Algorithm, MapSizes, PortRange};

/// Everything that can be set.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct File {
    /// Devices that clients' packets and backends' answers come in by.
    pub devices: Vec<String>,
    /// Where packets are taken off a device.
    pub acceleration: Acceleration,
    /// IPv4 source of translated connections; none: the first global address of the devices.
    pub address: Option<Ipv4Addr>,
    /// IPv6 source of translated connections; none: likewise.
    pub address6: Option<Ipv6Addr>,
    /// Source ports of translated connections, `FIRST-LAST`; a power of two of them.
    pub snat_ports: PortRange,
    /// Other sources, by name.
    pub pools: Vec<Spanned<Pool>>,
    /// What services have unless they say otherwise.
    pub defaults: Defaults,
    /// What is balanced.
    pub services: Vec<Spanned<Service>>,
    /// Directory for the socket and what survives a restart.
    pub state_dir: PathBuf,
    /// The packet path.
    pub bpf: Bpf,
    /// What the process says: a level, or a filter such as `cirri=debug`.
    pub log: String,
}

/// A source that services can be given by name.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Pool {
    /// Its name.
    pub name: String,
    /// Its IPv4 address.
    pub address: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub address6: Option<Ipv6Addr>,
    /// Its ports; a power of two of them.
    pub ports: PortRange,
}

/// What services have unless they say otherwise.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Defaults {
    /// See [`Service::algorithm`].
    pub algorithm: Option<Algorithm>,
    /// See [`Service::maglev_size`].
    pub maglev_size: Option<u32>,
    /// See [`Service::forwarding`].
    pub forwarding: Option<ForwardingName>,
    /// See [`Service::affinity`].
    pub affinity: Option<u32>,
    /// See [`Service::pool`].
    pub pool: Option<String>,
    /// See [`Service::health`].
    pub health: Option<Health>,
}

/// One address, port and protocol that is balanced.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Service {
    /// Its name.
    pub name: String,
    /// The address that clients use.
    pub address: IpAddr,
    /// The port that clients use.
    pub port: PortNumber,
    /// The protocol.
    #[serde(default)]
    pub protocol: Protocol,
    /// How a backend is chosen.
    pub algorithm: Option<Algorithm>,
    /// Places in the Maglev table, one of the sizes that `cirri_control::service::maglev` knows;
    /// none: by the number of backends.
    pub maglev_size: Option<u32>,
    /// How packets reach a backend.
    pub forwarding: Option<ForwardingName>,
    /// Seconds that a client keeps its backend; 0: not at all.
    pub affinity: Option<u32>,
    /// Clients that may connect; empty: all.
    #[serde(default)]
    pub source_ranges: Vec<IpNet>,
    /// The source of translated connections; none: `address`, `address6` and `snatPorts`.
    pub pool: Option<String>,
    /// Who serves.
    #[serde(default)]
    pub backends: Vec<Spanned<Backend>>,
    /// How backends are checked; none: not at all.
    pub health: Option<Health>,
}

/// One that serves.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Backend {
    /// Its name; none: `ADDRESS:PORT`.
    pub name: Option<String>,
    /// Its address.
    pub address: IpAddr,
    /// Its port; none: the service's.
    pub port: Option<PortNumber>,
    /// Its share of the connections beside the others'; 0: no new ones.
    #[serde(default = "one")]
    pub weight: u16,
}

/// How backends are checked.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Health {
    /// What is tried.
    #[serde(rename = "type")]
    pub kind: HealthKind,
    /// The port; none: the backend's.
    pub port: Option<PortNumber>,
    /// HTTP: the path; `/` if none.
    pub path: Option<String>,
    /// HTTP: the `Host` header; none: address and port.
    pub host: Option<String>,
    /// HTTP: codes that mean health; 200-399 if none.
    pub expect: Option<CodeRange>,
    /// Time from the start of one check to that of the next.
    #[serde(default = "two_seconds")]
    pub interval: Span,
    /// How long an answer may take.
    #[serde(default = "one_second")]
    pub timeout: Span,
    /// Good checks in a row that bring a backend back.
    #[serde(default = "two")]
    pub rise: u32,
    /// Failed checks in a row that take a backend out.
    #[serde(default = "three")]
    pub fall: u32,
}

/// What a check tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HealthKind {
    /// A TCP connection.
    Tcp,
    /// An HTTP/1.1 GET.
    Http,
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP.
    #[default]
    #[serde(alias = "tcp")]
    Tcp,
    /// UDP.
    #[serde(alias = "udp")]
    Udp,
    /// SCTP.
    #[serde(alias = "sctp")]
    Sctp,
}

/// How packets reach a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ForwardingName {
    /// Translated at both ends; answers come back through here.
    #[default]
    Snat,
    /// With the client's address, the service's in an IP option; a Cirri node answers the client.
    DsrOption,
    /// Untouched, in IPIP; the backend has the service's address and answers the client.
    DsrIpip,
}

/// The packet path.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Bpf {
    /// Directory of a bpffs that pins are kept under.
    pub pin_root: PathBuf,
    /// Name of this load balancer's directory in it; one per load balancer on a machine.
    pub instance: String,
    /// Sizes of maps, entries; 0: the built-in size.
    pub maps: MapSizes,
}

/// A port, 1 to 65535.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "i64")]
pub struct PortNumber(pub u16);

/// HTTP codes from the first to the last, both included: `200`, `200-399`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodeRange {
    /// First.
    pub first: u16,
    /// Last.
    pub last: u16,
}

/// A length of time: seconds, or a number with `ms`, `s` or `m`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span(pub Duration);

impl Default for File {
    fn default() -> File {
        File {
            devices: Vec::new(),
            acceleration: Acceleration::BestEffort,
            address: None,
            address6: None,
            snat_ports: PortRange { first: 49152, last: 65535 },
            pools: Vec::new(),
            defaults: Defaults::default(),
            services: Vec::new(),
            state_dir: PathBuf::from(STATE_DIR),
            bpf: Bpf::default(),
            log: "info".to_owned(),
        }
    }
}

/// The state directory unless the file names another.
pub const STATE_DIR: &str = "/run/cirri-lb";

impl Default for Bpf {
    fn default() -> Bpf {
        Bpf { pin_root: PathBuf::from("/sys/fs/bpf/cirri"), instance: "lb".to_owned(), maps: MapSizes::default() }
    }
}

impl Protocol {
    /// Its number in IP.
    pub fn number(self) -> u8 {
        match self {
            Protocol::Tcp => cirri_abi::proto::TCP,
            Protocol::Udp => cirri_abi::proto::UDP,
            Protocol::Sctp => cirri_abi::proto::SCTP,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        })
    }
}

impl ForwardingName {
    /// Its number in the tables.
    pub fn number(self) -> u8 {
        match self {
            ForwardingName::Snat => cirri_abi::Forwarding::SNAT,
            ForwardingName::DsrOption => cirri_abi::Forwarding::DSR_OPTION,
            ForwardingName::DsrIpip => cirri_abi::Forwarding::DSR_IPIP,
        }
    }
}

impl TryFrom<i64> for PortNumber {
    type Error = String;

    fn try_from(number: i64) -> Result<PortNumber, String> {
        match u16::try_from(number) {
            Ok(port) if port > 0 => Ok(PortNumber(port)),
            _ => Err(format!("port {number} is out of range; a port is 1 to 65535")),
        }
    }
}

impl<'de> Deserialize<'de> for CodeRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<CodeRange, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = CodeRange;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an HTTP code such as 200, or a range such as 200-399")
            }

            fn visit_u64<E: de::Error>(self, code: u64) -> Result<CodeRange, E> {
                self.visit_str(&code.to_string())
            }

            fn visit_i64<E: de::Error>(self, code: i64) -> Result<CodeRange, E> {
                self.visit_str(&code.to_string())
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<CodeRange, E> {
                let (first, last) = text.split_once('-').unwrap_or((text, text));
                let code = |text: &str| text.trim().parse().ok().filter(|code| (100..=599).contains(code));
                match (code(first), code(last)) {
                    (Some(first), Some(last)) if first <= last => Ok(CodeRange { first, last }),
                    _ => Err(E::custom(format!(
                        "`{text}` is no range of HTTP codes; write 200, or FIRST-LAST within 100-599"
                    ))),
                }
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Span, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Span;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("seconds, or a time such as 500ms, 2s, 1m")
            }

            fn visit_u64<E: de::Error>(self, seconds: u64) -> Result<Span, E> {
                Ok(Span(Duration::from_secs(seconds)))
            }

            fn visit_i64<E: de::Error>(self, seconds: i64) -> Result<Span, E> {
                self.visit_str(&seconds.to_string())
            }

            fn visit_f64<E: de::Error>(self, seconds: f64) -> Result<Span, E> {
                self.visit_str(&seconds.to_string())
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Span, E> {
                let units = [("ms", 0.001), ("s", 1.0), ("m", 60.0), ("", 1.0)];
                let seconds = units.into_iter().find_map(|(unit, seconds)| {
                    let number: f64 = text.strip_suffix(unit)?.trim_end().parse().ok()?;
                    Some(number * seconds)
                });
                seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()).map(Span).ok_or_else(|| {
                    E::custom(format!("`{text}` is no time; write seconds, or a number with ms, s or m, as 500ms"))
                })
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

fn one() -> u16 {
    1
}

fn two() -> u32 {
    2
}

fn three() -> u32 {
    3
}

fn one_second() -> Span {
    Span(Duration::from_secs(1))
}

fn two_seconds() -> Span {
    Span(Duration::from_secs(2))
}
