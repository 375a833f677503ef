//! Whether a service's packet comes out as it should: read anew from its bytes, with every checksum
//! summed again.

use std::net::IpAddr;

use anyhow::{Context, Result, bail, ensure};
use cirri_abi::{Forwarding, dsr, proto};
use serde::Serialize;

use super::cases::{Case, End, Kind, Measured};
use super::frame;
use super::ground::{GATEWAY_MAC, Ground, NODE, PEER_MAC, UPLINK_MAC, WORLD};
use super::packets::Stage;
use super::served::{BACKEND_PORT, Lane};

/// What came out of a case's program.
#[derive(Clone, Debug, Serialize)]
pub struct Checked {
    pub case: &'static str,
    pub program: &'static str,
    pub family: u8,
    /// In words.
    pub packet: String,
}

/// A packet, from outside to inside.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Seen {
    to: [u8; 6],
    from: [u8; 6],
    /// Source and destination of the header around it.
    outer: Option<(IpAddr, IpAddr)>,
    /// The service's address and port in an option.
    option: Option<(IpAddr, u16)>,
    src: IpAddr,
    dst: IpAddr,
    sport: u16,
    dport: u16,
}

/// Runs a service's packet once and checks what comes out. `None`: not a case that this knows.
pub fn check(
    case: &'static Case,
    stage: &mut Stage<'_>,
    ground: &Ground,
    v6: bool,
    measured: &Measured,
) -> Result<Option<Checked>> {
    let Some(lane) = case.lane else { return Ok(None) };
    let leg = &measured.leg;
    let landed = stage.trial.run(leg.program, &leg.shot(&measured.packet, 0, 0, 1))?;
    let wrong = |what: &str| format!("{} (IPv{}): {what}", case.name, if v6 { 6 } else { 4 });
    if leg.refuses(landed.action) {
        bail!(wrong(&format!("{} answered {}", leg.program, landed.action)));
    }
    let before = read(&measured.packet).with_context(|| wrong("the packet itself is broken"))?;
    let seen = read(&landed.packet).with_context(|| wrong("what came out is broken"))?;
    judge(case, lane, ground, v6, &before, &seen).with_context(|| wrong(&format!("came out as {seen:?}")))?;
    Ok(Some(Checked {
        case: case.name,
        program: leg.program,
        family: if v6 { 6 } else { 4 },
        packet: words(&before, &seen),
    }))
}

fn judge(case: &Case, lane: Lane, ground: &Ground, v6: bool, before: &Seen, seen: &Seen) -> Result<()> {
    if case.kind == Kind::Answers {
        ensure!((seen.src, seen.sport) == (lane.address(v6), lane.port()), "not from the service");
        ensure!(seen.dst == WORLD.of(v6) && seen.outer.is_none() && seen.option.is_none(), "not to the client");
        return macs(case, seen, GATEWAY_MAC);
    }
    let backends = lane.backends(ground, v6);
    let mut inner = seen.clone();
    if lane.forwarding == Forwarding::DSR_IPIP {
        let (src, dst) = seen.outer.context("no outer header")?;
        ensure!(src == NODE.of(v6) && backends.contains(&dst), "the outer header leads elsewhere");
        inner.outer = None;
        (inner.to, inner.from) = (before.to, before.from);
        ensure!(inner == *before, "what is inside is not what came");
    } else {
        ensure!(seen.outer.is_none(), "an outer header");
        ensure!(backends.contains(&seen.dst) && seen.dport == BACKEND_PORT, "not to a backend");
        if lane.forwarding == Forwarding::SNAT && case.from == End::World && case.to == End::Remote {
            ensure!(seen.src == NODE.of(v6) && seen.sport != before.sport, "not from the node");
        } else {
            ensure!((seen.src, seen.sport) == (before.src, before.sport), "not from the client");
        }
    }
    let first = lane.forwarding == Forwarding::DSR_OPTION && case.kind == Kind::New;
    ensure!(seen.option == first.then(|| (lane.address(v6), lane.port())), "the option is not what it should be");
    macs(case, seen, PEER_MAC)
}

/// At the edge the Ethernet header is the program's; at tc the kernel writes it when the packet leaves.
fn macs(case: &Case, seen: &Seen, to: [u8; 6]) -> Result<()> {
    ensure!(!case.edge || (seen.to, seen.from) == (to, UPLINK_MAC), "wrong Ethernet addresses");
    Ok(())
}

fn words(before: &Seen, seen: &Seen) -> String {
    let inner = format!(
        "{} → {} became {} → {}",
        end(before.src, before.sport),
        end(before.dst, before.dport),
        end(seen.src, seen.sport),
        end(seen.dst, seen.dport)
    );
    let outer = seen.outer.map(|(src, dst)| format!(", in IPIP {src} → {dst}"));
    let option = seen.option.map(|(addr, port)| format!(", with the option {}", end(addr, port)));
    format!("{inner}{}{}; checksums verify", outer.unwrap_or_default(), option.unwrap_or_default())
}

fn end(ip: IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(ip, port).to_string()
}

/// Takes a frame apart; `Err` if a checksum or a length does not fit.
fn read(frame: &[u8]) -> Result<Seen> {
    let macs = frame.get(..12).context("too short")?;
    let v6 = frame.get(12..14) == Some(&[0x86, 0xdd]);
    let ip = frame.get(14..).context("too short")?;
    let mut packet = if v6 { ipv6(ip)? } else { ipv4(ip)? };
    let mut outer = None;
    if packet.protocol == if v6 { dsr::IPV6 } else { dsr::IPIP } {
        outer = Some((packet.src, packet.dst));
        packet = if v6 { ipv6(packet.payload)? } else { ipv4(packet.payload)? };
    }
    ensure!(packet.protocol == proto::TCP, "protocol {}", packet.protocol);
    let mut pseudo = frame::octets(packet.src);
    pseudo.extend(frame::octets(packet.dst));
    pseudo.extend([0, packet.protocol]);
    pseudo.extend((packet.payload.len() as u16).to_be_bytes());
    pseudo.extend(packet.payload);
    ensure!(frame::checksum(&pseudo) == 0, "the TCP checksum does not verify");
    let (to, from) = macs.split_at(6);
    Ok(Seen {
        to: to.try_into()?,
        from: from.try_into()?,
        outer,
        option: packet.option,
        src: packet.src,
        dst: packet.dst,
        sport: word(packet.payload, 0)?,
        dport: word(packet.payload, 2)?,
    })
}

struct Ip<'a> {
    src: IpAddr,
    dst: IpAddr,
    protocol: u8,
    option: Option<(IpAddr, u16)>,
    payload: &'a [u8],
}

fn ipv4(bytes: &[u8]) -> Result<Ip<'_>> {
    let first = *bytes.first().context("too short")?;
    ensure!(first >> 4 == 4, "no IPv4 header");
    let header = bytes.get(..usize::from(first & 15) * 4).context("too short")?;
    ensure!(frame::checksum(header) == 0, "the IP checksum does not verify");
    ensure!(usize::from(word(bytes, 2)?) == bytes.len(), "the IP length is wrong");
    let address =
        |at: usize| -> Result<IpAddr> { Ok(<[u8; 4]>::try_from(bytes.get(at..at + 4).context("too short")?)?.into()) };
    let option = if header.len() > 20 {
        ensure!(header.get(20..22) == Some(&[dsr::OPTION_V4, dsr::LENGTH_V4 as u8]), "another option");
        Some((address(24)?, word(bytes, 22)?))
    } else {
        None
    };
    Ok(Ip {
        src: address(12)?,
        dst: address(16)?,
        protocol: *bytes.get(9).context("too short")?,
        option,
        payload: bytes.get(header.len()..).context("too short")?,
    })
}

fn ipv6(bytes: &[u8]) -> Result<Ip<'_>> {
    ensure!(bytes.first().is_some_and(|first| first >> 4 == 6), "no IPv6 header");
    ensure!(usize::from(word(bytes, 4)?) + 40 == bytes.len(), "the IP length is wrong");
    let address = |at: usize| -> Result<IpAddr> {
        Ok(<[u8; 16]>::try_from(bytes.get(at..at + 16).context("too short")?)?.into())
    };
    let next = *bytes.get(6).context("too short")?;
    const DESTINATION_OPTIONS: u8 = 60;
    let (protocol, option, at) = if next == DESTINATION_OPTIONS {
        ensure!(bytes.get(42) == Some(&dsr::OPTION_V6), "another option");
        (*bytes.get(40).context("too short")?, Some((address(44)?, word(bytes, 60)?)), 40 + dsr::LENGTH_V6 as usize)
    } else {
        (next, None, 40)
    };
    let payload = bytes.get(at..).context("too short")?;
    Ok(Ip { src: address(8)?, dst: address(24)?, protocol, option, payload })
}

fn word(bytes: &[u8], at: usize) -> Result<u16> {
    Ok(u16::from_be_bytes(bytes.get(at..at + 2).context("too short")?.try_into()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cmd::bench::frame::{ACK, Frame};

    fn frame(src: &str, dst: &str) -> Vec<u8> {
        let (src, dst) = (src.parse().unwrap(), dst.parse().unwrap());
        Frame { to: [2; 6], from: [4; 6], src, dst, sport: 10_000, dport: 80, tcp: Some(ACK) }.bytes()
    }

    #[test]
    fn a_good_frame_reads_and_one_changed_bit_does_not() {
        for (src, dst) in [("10.1.2.3", "10.4.5.6"), ("fd00::1", "fd00::2")] {
            let bytes = frame(src, dst);
            let seen = read(&bytes).unwrap();
            assert_eq!((seen.src.to_string(), seen.dst.to_string()), (src.to_owned(), dst.to_owned()));
            assert_eq!((seen.sport, seen.dport, seen.outer, seen.option), (10_000, 80, None, None));
            for at in [30, 60, 95] {
                let mut broken = bytes.clone();
                broken[at] ^= 4;
                assert!(read(&broken).is_err(), "{src} at {at}");
            }
        }
    }

    #[test]
    fn what_is_in_ipip_is_read_from_inside() {
        let inner = frame("10.1.2.3", "10.4.5.6");
        let mut header = vec![0x45, 0, 0, 102, 0, 80, 0x40, 0, 64, dsr::IPIP, 0, 0, 10, 0, 0, 1, 10, 244, 1, 64];
        let sum = frame::checksum(&header).to_be_bytes();
        header.splice(10..12, sum);
        let wrapped = [&inner[..14], &header, &inner[14..]].concat();
        let seen = read(&wrapped).unwrap();
        assert_eq!(seen.outer, Some(("10.0.0.1".parse().unwrap(), "10.244.1.64".parse().unwrap())));
        assert_eq!(seen.dst.to_string(), "10.4.5.6");
    }
}
