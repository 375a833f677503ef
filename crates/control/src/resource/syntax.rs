//! The spelling rules of Kubernetes: names, labels, ports, CIDRs.
//!
//! Each check answers `Err` with a sentence that continues "this value ...".

use ipnet::IpNet;
use std::net::IpAddr;

/// A DNS label (RFC 1123): namespaces and containers.
pub fn dns_label(text: &str) -> Result<(), &'static str> {
    if text.is_empty() || text.len() > 63 || !is_dns_label(text) {
        return Err(
            "is not a DNS label: use 1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or a digit",
        );
    }
    Ok(())
}

/// A DNS subdomain (RFC 1123): pods, nodes, policies.
pub fn dns_subdomain(text: &str) -> Result<(), &'static str> {
    if text.len() > 253 || !text.split('.').all(is_dns_label) {
        return Err(
            "is not a DNS subdomain: use up to 253 of a-z, 0-9, '-' and '.', each part beginning and ending with a letter or a digit",
        );
    }
    Ok(())
}

/// The name of a port (IANA service name).
pub fn port_name(text: &str) -> Result<(), &'static str> {
    let spelled = text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    let lettered = text.bytes().any(|b| b.is_ascii_lowercase());
    if text.len() > 15 || !spelled || !lettered || text.contains("--") || text.starts_with('-') || text.ends_with('-') {
        return Err(
            "is not a port name: use up to 15 of a-z, 0-9 and single '-', with at least one letter (a port number stands without quotes)",
        );
    }
    Ok(())
}

/// The key of a label: `name` or `prefix/name`.
pub fn label_key(text: &str) -> Result<(), &'static str> {
    let name = match text.split_once('/') {
        Some((prefix, name)) => {
            if prefix.is_empty() || dns_subdomain(prefix).is_err() {
                return Err("is not a label key: what stands before '/' must be a DNS subdomain");
            }
            name
        }
        None => text,
    };
    if name.is_empty() || !is_label_name(name) {
        return Err(
            "is not a label key: use 1 to 63 of letters, digits, '-', '_' and '.', beginning and ending with a letter or a digit",
        );
    }
    Ok(())
}

/// The value of a label; may be empty.
pub fn label_value(text: &str) -> Result<(), &'static str> {
    if !text.is_empty() && !is_label_name(text) {
        return Err(
            "is not a label value: use up to 63 of letters, digits, '-', '_' and '.', beginning and ending with a letter or a digit",
        );
    }
    Ok(())
}

/// An IP prefix. Bits past the prefix are cut, as the API server's users expect. Numbers with
/// leading zeros are refused: some readers take them for octal.
pub fn cidr(text: &str) -> Result<IpNet, &'static str> {
    let parts = || {
        let (address, length) = text.split_once('/')?;
        let plain = length == "0" || (length.bytes().all(|b| b.is_ascii_digit()) && !length.starts_with('0'));
        IpNet::new(address.parse().ok()?, length.parse().ok().filter(|_| plain)?).ok()
    };
    let net = parts().ok_or("is not an IP prefix: write ADDRESS/LENGTH, such as 10.0.0.0/8 or fd00::/8")?;
    if let IpNet::V6(v6) = net
        && v6.addr().to_ipv4_mapped().is_some()
        && v6.prefix_len() >= 96
    {
        return Err("is an IPv4 prefix in IPv6 spelling: write it as IPv4");
    }
    Ok(net.trunc())
}

/// An IP address. Each has one spelling: IPv4 in IPv6 would be told apart from IPv4 in some places.
pub fn address(text: &str) -> Result<IpAddr, &'static str> {
    match text.parse().map_err(|_| "is not an IP address: write it as 10.0.0.1 or fd00::1")? {
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => Err("is an IPv4 address in IPv6 spelling: write it as IPv4"),
        address => Ok(address),
    }
}

/// Whether an address is one host's, wherever it is asked for: a loopback or link-local one is another host's on
/// every node.
pub fn is_one_hosts(address: IpAddr) -> bool {
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !(address.is_unspecified() || address.is_loopback() || address.is_multicast() || link_local)
}

fn is_dns_label(text: &str) -> bool {
    !text.is_empty()
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

fn is_label_name(text: &str) -> bool {
    let edge = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_alphanumeric());
    text.len() <= 63
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && edge(text.bytes().next())
        && edge(text.bytes().last())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_api_server() {
        for good in ["a", "web-1", "0"] {
            assert!(dns_label(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", &"a".repeat(64)] {
            assert!(dns_label(bad).is_err(), "{bad}");
        }
        assert!(dns_subdomain("a.b-c.d").is_ok());
        for bad in ["", "a..b", ".a", "a_b"] {
            assert!(dns_subdomain(bad).is_err(), "{bad}");
        }
        assert!(port_name("http-2").is_ok());
        for bad in ["", "80", "HTTP", "a--b", "-a", "sixteen-letters-"] {
            assert!(port_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn labels_follow_the_api_server() {
        for good in ["app", "app.kubernetes.io/name", "A_b.c"] {
            assert!(label_key(good).is_ok(), "{good}");
        }
        for bad in ["", "/a", "a/", "a/b/c", "-a", "a b", "A/b", "a;b"] {
            assert!(label_key(bad).is_err(), "{bad}");
        }
        assert!(label_value("").is_ok() && label_value("A.b_c-1").is_ok());
        assert!(label_value("a=b").is_err() && label_value("-").is_err());
    }

    #[test]
    fn a_prefix_is_cut_and_has_one_spelling() {
        assert_eq!(cidr("10.1.2.3/8").unwrap().to_string(), "10.0.0.0/8");
        assert_eq!(cidr("::/0").unwrap().to_string(), "::/0");
        for bad in [
            "10.0.0.0",
            "10.0.0.0/33",
            "010.0.0.0/8",
            "10.0.0.0/08",
            "10.0.0.0/+8",
            "10.0.0.0/",
            "::ffff:10.0.0.0/104",
            "x/8",
        ] {
            assert!(cidr(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_address_has_one_spelling() {
        assert!(address("10.0.0.1").is_ok() && address("fd00::1").is_ok());
        for bad in ["", "10.0.0", "10.0.0.01", "::ffff:10.0.0.1", "fd00::1%eth0", "[fd00::1]"] {
            assert!(address(bad).is_err(), "{bad}");
        }
    }
}
