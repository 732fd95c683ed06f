//! Records of issued certificates as bytes, one after the other: serial number (16), end of life (8), signer (4), length
//! of the identity (2) and the identity, length of the node's name (2) and the name. A node that is not known has length
//! 65535. Numbers are little-endian. Pure.

use crate::{ca::authority::IssuedRecord, mesh::Identity};

const NO_NODE: u16 = u16::MAX;

/// Appends `record`. Fails for names that are longer than any that Kubernetes takes.
pub(super) fn encode(record: &IssuedRecord, into: &mut Vec<u8>) -> Option<()> {
    let identity = record.identity.as_str();
    let node = record.node.as_deref();
    let node_length = match node {
        Some(node) => u16::try_from(node.len())
            .ok()
            .filter(|&length| length != NO_NODE)?,
        None => NO_NODE,
    };
    let identity_length = u16::try_from(identity.len()).ok()?;
    into.extend(record.serial);
    into.extend(record.not_after.to_le_bytes());
    into.extend(record.signer.to_le_bytes());
    into.extend(identity_length.to_le_bytes());
    into.extend(identity.as_bytes());
    into.extend(node_length.to_le_bytes());
    into.extend(node.unwrap_or_default().as_bytes());
    Some(())
}

/// Reads all records of `bytes`. Fails with the place that is damaged.
pub(super) fn read(mut bytes: &[u8]) -> Result<Vec<IssuedRecord>, String> {
    let mut records = Vec::new();
    let total = bytes.len();
    while !bytes.is_empty() {
        let at = total - bytes.len();
        let record = one(&mut bytes).ok_or_else(|| format!("is damaged at byte {at}"))?;
        records.push(record);
    }
    Ok(records)
}

fn one(bytes: &mut &[u8]) -> Option<IssuedRecord> {
    let serial = take(bytes)?;
    let not_after = u64::from_le_bytes(take(bytes)?);
    let signer = u32::from_le_bytes(take(bytes)?);
    let identity_length = u16::from_le_bytes(take(bytes)?);
    let identity: Identity = text(bytes, identity_length)?.parse().ok()?;
    let node = match u16::from_le_bytes(take(bytes)?) {
        NO_NODE => None,
        length => Some(text(bytes, length)?.to_owned()),
    };
    Some(IssuedRecord {
        serial,
        not_after,
        signer,
        identity,
        node,
    })
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*first)
}

fn text<'a>(bytes: &mut &'a [u8], length: u16) -> Option<&'a str> {
    let (text, rest) = bytes.split_at_checked(usize::from(length))?;
    *bytes = rest;
    std::str::from_utf8(text).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(serial: u8, not_after: u64) -> IssuedRecord {
        IssuedRecord {
            serial: [serial; 16],
            not_after,
            signer: 1,
            identity: "spiffe://cluster.local/ns/default/sa/web".parse().unwrap(),
            node: Some("node-a".into()),
        }
    }

    proptest! {
        #[test]
        fn what_is_kept_is_read_back(
            serials in proptest::collection::vec((any::<[u8; 16]>(), any::<u64>(), any::<u32>()), 0..8),
            account in "[a-z]{1,12}",
            node in proptest::option::of("[a-z0-9.-]{0,30}"),
        ) {
            let identity: Identity = format!("spiffe://cluster.local/ns/default/sa/{account}").parse().unwrap();
            let records: Vec<_> = serials.into_iter().map(|(serial, not_after, signer)| IssuedRecord {
                serial, not_after, signer, identity: identity.clone(), node: node.clone(),
            }).collect();
            let mut bytes = Vec::new();
            for record in &records {
                encode(record, &mut bytes).unwrap();
            }
            prop_assert_eq!(read(&bytes).unwrap(), records);
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&bytes);
        }
    }

    #[test]
    fn half_a_record_is_damage() {
        let mut bytes = Vec::new();
        encode(&record(1, 5), &mut bytes).unwrap();
        let whole = bytes.len();
        encode(&record(2, 5), &mut bytes).unwrap();
        bytes.pop();
        assert_eq!(
            read(&bytes).unwrap_err(),
            format!("is damaged at byte {whole}")
        );
        let long = IssuedRecord {
            node: Some("x".repeat(70_000)),
            ..record(1, 5)
        };
        assert!(encode(&long, &mut bytes).is_none());
    }
}
