//! Names and numbers that follow from an attachment alone, so that plugin and agent agree on them.

use crate::api::Attachment;

/// The node's side of the device of an attachment: `lxc` and eight digits of a hash.
pub fn host_ifname(attachment: &Attachment) -> String {
    format!("lxc{:08x}", digest(attachment) as u32)
}

/// The Ethernet address inside, unless the runtime wants another: locally administered, from a hash.
pub fn default_mac(attachment: &Attachment) -> [u8; 6] {
    let bytes = digest(attachment).to_be_bytes();
    [0x02, bytes[0], bytes[1], bytes[2], bytes[3], bytes[4]]
}

/// `02:00:...` as text.
pub fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Text as six bytes; `None` if it is no unicast Ethernet address.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2)?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    let unicast = mac[0] & 1 == 0 && mac != [0; 6];
    (parts.next().is_none() && unicast).then_some(mac)
}

/// FNV-1a, 64 bits: the same in every build, since names outlive the process.
fn digest(attachment: &Attachment) -> u64 {
    let text = format!("{}/{}", attachment.container_id, attachment.ifname);
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_the_kernel_and_differ() {
        let name =
            |container_id: &str| host_ifname(&Attachment { container_id: container_id.into(), ifname: "eth0".into() });
        assert_eq!(name("a").len(), 11);
        assert_ne!(name("a"), name("b"));
    }

    #[test]
    fn macs_read_back_and_nonsense_does_not() {
        let mac = default_mac(&Attachment { container_id: "a".into(), ifname: "eth0".into() });
        assert_eq!(parse_mac(&mac_text(mac)), Some(mac));
        for bad in
            ["", "02:00:00:00:00", "01:00:00:00:00:00", "0:0:0:0:0:0", "00:00:00:00:00:00", "02:00:00:00:00:00:00"]
        {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }
}
