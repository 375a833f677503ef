//! What follows from an attachment alone, so that plugin and agent agree on it: names, numbers, devices.

use cirri_loader::net::{Net, NetError};

use crate::api::Attachment;

/// A name for the node's side of the device of an attachment: `lxc` and eight digits of a hash. Others may
/// have it: then the next number gives another.
pub fn host_ifname(attachment: &Attachment, number: u32) -> String {
    let text = if number == 0 { named(attachment) } else { format!("{}#{number}", named(attachment)) };
    format!("lxc{:08x}", digest(&text) as u32)
}

/// Whose the device of an attachment is: its alias. At most [`LONGEST_OWNER`] bytes.
pub fn owner(attachment: &Attachment) -> String {
    format!("{OWNER}{}", named(attachment))
}

/// Whether an alias says that a device is some attachment's.
pub fn is_owner(alias: &str) -> bool {
    alias.starts_with(OWNER)
}

/// What aliases of attachments' devices begin with.
const OWNER: &str = "cirri ";
/// Longest alias of a device, bytes; the kernel's `IFALIASZ` without its terminator.
pub const LONGEST_OWNER: usize = 255;

/// Removes every device of the namespace that says it is this attachment's; what is gone is no error.
///
/// # Errors
/// The kernel does not do it.
pub async fn delete_devices(net: &Net, attachment: &Attachment) -> Result<(), NetError> {
    let owner = owner(attachment);
    for link in net.links().await? {
        if link.alias == owner {
            net.delete_link_by_index(link.index).await?;
        }
    }
    Ok(())
}

/// The Ethernet address inside, unless the runtime wants another: locally administered, from a hash.
pub fn default_mac(attachment: &Attachment) -> [u8; 6] {
    let bytes = digest_of(attachment).to_be_bytes();
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

/// A number for an attachment, 64 bits.
pub fn digest_of(attachment: &Attachment) -> u64 {
    digest(&named(attachment))
}

/// None of the parts can have a slash.
fn named(attachment: &Attachment) -> String {
    format!("{}/{}/{}", attachment.network, attachment.container_id, attachment.ifname)
}

/// FNV-1a, 64 bits: the same in every build, since names outlive the process.
pub fn digest(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attachment(network: &str, container_id: &str) -> Attachment {
        Attachment { network: network.into(), container_id: container_id.into(), ifname: "eth0".into() }
    }

    #[test]
    fn names_fit_the_kernel_and_differ() {
        let names = [("n", "a", 0), ("n", "b", 0), ("m", "a", 0), ("n", "a", 1), ("n", "a", 2)]
            .map(|(network, id, number)| host_ifname(&attachment(network, id), number));
        assert!(names.iter().all(|name| name.len() == 11));
        assert_eq!(std::collections::BTreeSet::from(names).len(), 5);
    }

    #[test]
    fn an_owner_is_one_attachment() {
        assert_eq!(owner(&attachment("n", "a")), "cirri n/a/eth0");
        assert_ne!(owner(&attachment("n", "a")), owner(&attachment("m", "a")));
    }

    #[test]
    fn macs_read_back_and_nonsense_does_not() {
        let mac = default_mac(&attachment("n", "a"));
        assert_eq!(parse_mac(&mac_text(mac)), Some(mac));
        for bad in
            ["", "02:00:00:00:00", "01:00:00:00:00:00", "0:0:0:0:0:0", "00:00:00:00:00:00", "02:00:00:00:00:00:00"]
        {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }
}
