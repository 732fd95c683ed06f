//! The TLS 1.3 record layer after the handshake (RFC 8446 §5). It works in place, without a copy between the socket and
//! the cipher.
//!
//! rustls performs the handshake. This module applies the keys, as the kernel does with kTLS, and updates them.

use rustls::crypto::cipher::{Iv, Nonce};

use super::{
    aead::{self, AeadKey, TAG_BYTES},
    secrets::TrafficSecret,
};

/// Size of a record's header, in bytes.
pub const HEADER_BYTES: usize = aead::HEADER_BYTES;
/// Largest plaintext of a record, in bytes (RFC 8446 §5.1).
pub const MAX_PLAIN_BYTES: usize = 1 << 14;
/// Bytes that sealing adds after the plaintext: the inner content type and the tag.
pub const TRAILER_BYTES: usize = 1 + TAG_BYTES;
/// Largest record that [`Sealer`] produces, in bytes.
pub const MAX_RECORD_BYTES: usize = HEADER_BYTES + MAX_PLAIN_BYTES + TRAILER_BYTES;
/// Largest ciphertext that a peer may send, in bytes (RFC 8446 §5.2).
const MAX_CIPHER_BYTES: usize = MAX_PLAIN_BYTES + 256;
/// Number of records after which a key is updated: well below AES-GCM's limit of 2^24.5 (RFC 8446 §5.5).
const REKEY_AFTER: u64 = 1 << 23;

/// Inner content type of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ContentType {
    /// An alert (RFC 8446 §6).
    Alert = 21,
    /// A post-handshake message (RFC 8446 §4.6).
    Handshake = 22,
    /// Bytes of the tunnel's frames.
    ApplicationData = 23,
}

/// How a peer violated the record layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRecord {
    /// Not a protected TLS 1.3 record.
    #[error("record header {0:02x?} is not TLS 1.3 application data")]
    Header([u8; HEADER_BYTES]),
    /// Longer than the protocol allows, or too short to hold a tag.
    #[error("record of {0} bytes")]
    Length(usize),
    /// The tag does not match: the record is forged, damaged or out of order.
    #[error("record cannot be decrypted")]
    Decrypt,
    /// The inner content type is unknown.
    #[error("record of unknown inner type")]
    ContentType,
}

/// Length of the first record in `bytes`, including its header. `None` while the record is incomplete.
pub fn complete(bytes: &[u8]) -> Result<Option<usize>, InvalidRecord> {
    let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else {
        return Ok(None);
    };
    if header[..3] != [ContentType::ApplicationData as u8, 3, 3] {
        return Err(InvalidRecord::Header(*header));
    }
    let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
    if !(TRAILER_BYTES..=MAX_CIPHER_BYTES).contains(&length) {
        return Err(InvalidRecord::Length(length));
    }
    let whole = HEADER_BYTES + length;
    Ok((bytes.len() >= whole).then_some(whole))
}

/// Key and nonce state of one direction of a connection.
struct Keyed {
    key: AeadKey,
    iv: Iv,
    sequence: u64,
    secret: TrafficSecret,
}

impl Keyed {
    fn new(sequence: u64, secret: TrafficSecret) -> Self {
        let (key, iv) = secret.keys();
        Self {
            key,
            iv,
            sequence,
            secret,
        }
    }

    fn update(&mut self) {
        self.secret.update();
        (self.key, self.iv) = self.secret.keys();
        self.sequence = 0;
    }

    fn next_nonce(&mut self) -> [u8; 12] {
        let nonce = Nonce::new(&self.iv, self.sequence);
        // Never overflows: keys are updated long before.
        self.sequence += 1;
        nonce.0
    }
}

/// Encrypts the records to send.
pub struct Sealer(Keyed);

impl Sealer {
    /// Creates a sealer whose next record has the number `sequence`.
    pub fn new(sequence: u64, secret: TrafficSecret) -> Self {
        Self(Keyed::new(sequence, secret))
    }

    /// Replaces the key by the next one. The last record must have announced it to the peer (RFC 8446 §4.6.3).
    pub fn update(&mut self) {
        self.0.update();
    }

    /// Whether the key has sealed enough records to be updated.
    pub fn wants_new_key(&self) -> bool {
        self.0.sequence >= REKEY_AFTER
    }

    /// Seals in place the `plain_bytes` of plaintext that start at [`HEADER_BYTES`] in `room`. Returns the length of
    /// the record.
    ///
    /// # Panics
    ///
    /// Panics if `plain_bytes` exceeds [`MAX_PLAIN_BYTES`], or if `room` has no space for [`TRAILER_BYTES`] after the
    /// plaintext.
    pub fn seal(&mut self, room: &mut [u8], plain_bytes: usize, kind: ContentType) -> usize {
        assert!(plain_bytes <= MAX_PLAIN_BYTES);
        let [high, low] = ((plain_bytes + TRAILER_BYTES) as u16).to_be_bytes();
        let header = [ContentType::ApplicationData as u8, 3, 3, high, low];
        let (prefix, rest) = room.split_at_mut(HEADER_BYTES);
        prefix.copy_from_slice(&header);
        rest[plain_bytes] = kind as u8;
        let (inner, behind) = rest.split_at_mut(plain_bytes + 1);
        let nonce = self.0.next_nonce();
        let tag = self.0.key.seal(nonce, header, inner);
        // Sealing fails only for inputs larger than 64 GiB.
        let tag = tag.expect("a record is within the AEAD's limits");
        behind[..TAG_BYTES].copy_from_slice(&tag);
        HEADER_BYTES + plain_bytes + TRAILER_BYTES
    }
}

/// Decrypts the received records.
pub struct Opener(Keyed);

impl Opener {
    /// Creates an opener whose next record has the number `sequence`.
    pub fn new(sequence: u64, secret: TrafficSecret) -> Self {
        Self(Keyed::new(sequence, secret))
    }

    /// Replaces the key by the next one, as the peer has announced (RFC 8446 §4.6.3).
    pub fn update(&mut self) {
        self.0.update();
    }

    /// Decrypts `record`, one complete record as found by [`complete`], in place. The plaintext starts at
    /// [`HEADER_BYTES`]. Returns its content type and length.
    pub fn open(&mut self, record: &mut [u8]) -> Result<(ContentType, usize), InvalidRecord> {
        let (header, cipher) = record
            .split_first_chunk_mut::<HEADER_BYTES>()
            .ok_or(InvalidRecord::Length(0))?;
        let nonce = self.0.next_nonce();
        let inner = self.0.key.open(nonce, *header, cipher);
        let inner = inner.ok_or(InvalidRecord::Decrypt)?;
        // The plaintext is followed by its content type and any number of zeros.
        let end = inner
            .iter()
            .rposition(|byte| *byte != 0)
            .ok_or(InvalidRecord::ContentType)?;
        if end > MAX_PLAIN_BYTES {
            return Err(InvalidRecord::Length(end));
        }
        let kind = [
            ContentType::ApplicationData,
            ContentType::Handshake,
            ContentType::Alert,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == inner[end])
        .ok_or(InvalidRecord::ContentType)?;
        Ok((kind, end))
    }
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sealer(..)")
    }
}

impl std::fmt::Debug for Opener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Opener(..)")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustls::crypto::{aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384, tls13::OkmBlock};

    use super::*;

    fn secret() -> TrafficSecret {
        let suite = TLS13_AES_256_GCM_SHA384.tls13().unwrap();
        TrafficSecret::new(suite, OkmBlock::new(&[7; 48])).unwrap()
    }

    fn pair() -> (Sealer, Opener) {
        (Sealer::new(0, secret()), Opener::new(0, secret()))
    }

    fn sealed(sealer: &mut Sealer, plain: &[u8]) -> Vec<u8> {
        let mut room = vec![0; MAX_RECORD_BYTES];
        room[HEADER_BYTES..HEADER_BYTES + plain.len()].copy_from_slice(plain);
        let length = sealer.seal(&mut room, plain.len(), ContentType::ApplicationData);
        room.truncate(length);
        room
    }

    #[test]
    fn round_trips_in_order_only() {
        let (mut sealer, mut opener) = pair();
        for plain in [&b"one"[..], b"", &[5; MAX_PLAIN_BYTES]] {
            let mut record = sealed(&mut sealer, plain);
            assert_eq!(complete(&record), Ok(Some(record.len())));
            assert_eq!(complete(&record[..record.len() - 1]), Ok(None));
            let (kind, length) = opener.open(&mut record).unwrap();
            assert_eq!(kind, ContentType::ApplicationData);
            assert_eq!(&record[HEADER_BYTES..HEADER_BYTES + length], plain);
        }
        let _skipped = sealed(&mut sealer, b"lost");
        let mut record = sealed(&mut sealer, b"next");
        assert_eq!(opener.open(&mut record), Err(InvalidRecord::Decrypt));
    }

    #[test]
    fn any_changed_bit_is_refused() {
        let (mut sealer, _) = pair();
        let record = sealed(&mut sealer, b"attack at dawn");
        for byte in 0..record.len() {
            let mut bad = record.clone();
            bad[byte] ^= 1;
            let refused = match complete(&bad) {
                Ok(Some(length)) => pair().1.open(&mut bad[..length]).is_err(),
                Ok(None) | Err(_) => true,
            };
            assert!(refused, "byte {byte}");
        }
    }

    #[test]
    fn refuses_headers_that_are_not_ours() {
        for header in [[22, 3, 3, 0, 40], [23, 3, 1, 0, 40], [21, 3, 3, 0, 2]] {
            assert_eq!(complete(&header), Err(InvalidRecord::Header(header)));
        }
        assert_eq!(complete(&[23, 3, 3, 0, 16]), Err(InvalidRecord::Length(16)));
        assert_eq!(
            complete(&[23, 3, 3, 0x41, 1]),
            Err(InvalidRecord::Length(16641))
        );
        assert_eq!(complete(&[23, 3, 3, 0x41]), Ok(None));
    }

    proptest! {
        #[test]
        fn random_records_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..128)) {
            let _ = complete(&bytes);
            let _ = pair().1.open(&mut bytes);
        }
    }
}
