//! Records of issued certificates as bytes, one after the other: serial number (16), end of life (8), signer (4), length
//! of the identity (2) and the identity, length of the node's name (2) and the name. A node that is not known has length
//! 65535. Numbers are big-endian.

use crate::{ca::authority::IssuedRecord, mesh::Identity};

const NO_NODE: u16 = u16::MAX;

/// Appends `record`.
///
/// Fails when the node's name is longer than a record can hold.
pub(super) fn encode(record: &IssuedRecord, into: &mut Vec<u8>) -> Result<(), String> {
    let node = match &record.node {
        None => (NO_NODE, ""),
        Some(node) => match u16::try_from(node.len()) {
            Ok(length) if length != NO_NODE => (length, node.as_str()),
            _ => return Err(format!("a node's name of {} bytes", node.len())),
        },
    };
    let identity = record.identity.as_str();
    let identity_length =
        u16::try_from(identity.len()).map_err(|_| "an endless identity".to_owned())?;
    into.extend(record.serial);
    into.extend(record.not_after.to_be_bytes());
    into.extend(record.signer.to_be_bytes());
    into.extend(identity_length.to_be_bytes());
    into.extend(identity.as_bytes());
    into.extend(node.0.to_be_bytes());
    into.extend(node.1.as_bytes());
    Ok(())
}

/// Reads all records of `bytes`.
pub(super) fn decode(mut bytes: &[u8]) -> Result<Vec<IssuedRecord>, String> {
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
    let not_after = u64::from_be_bytes(take(bytes)?);
    let signer = u32::from_be_bytes(take(bytes)?);
    let identity_length = u16::from_be_bytes(take(bytes)?);
    let identity: Identity = text(bytes, identity_length)?.parse().ok()?;
    let node = match u16::from_be_bytes(take(bytes)?) {
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
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(in crate::ca::store) fn record(serial: u8, not_after: u64) -> IssuedRecord {
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
            prop_assert_eq!(decode(&bytes).unwrap(), records);
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes);
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
            decode(&bytes).unwrap_err(),
            format!("is damaged at byte {whole}")
        );
        let long = IssuedRecord {
            node: Some("x".repeat(70_000)),
            ..record(1, 5)
        };
        assert!(encode(&long, &mut bytes).is_err());
    }
}
