//! The traffic secrets of a connection: what its keys are derived from, now and at each key update (RFC 8446 §7.2, §7.3).
//!
//! rustls derives the first ones in the handshake. It keeps them with 2 KiB of state that only handshakes need, such as the
//! peer's certificates, and its interface for other record layers hands out keys alone. So they are taken from the interface
//! for key logs, by the thread that runs a step of the handshake, and rustls' state is dropped after the handshake.

use std::cell::RefCell;

use rustls::{
    CipherSuite, KeyLog, Tls13CipherSuite,
    crypto::{cipher::Iv, tls13::OkmBlock},
};

use super::aead::{AeadKey, Cipher};

/// The secret of one direction of a connection. Zeroed when dropped.
pub struct TrafficSecret {
    suite: &'static Tls13CipherSuite,
    cipher: Cipher,
    secret: OkmBlock,
}

impl TrafficSecret {
    /// A connection's first secret. `None` if the cipher of `suite` is unknown.
    pub fn new(suite: &'static Tls13CipherSuite, secret: OkmBlock) -> Option<Self> {
        let cipher = match suite.common.suite {
            CipherSuite::TLS13_AES_128_GCM_SHA256 => Cipher::Aes128Gcm,
            CipherSuite::TLS13_AES_256_GCM_SHA384 => Cipher::Aes256Gcm,
            CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 => Cipher::Chacha20Poly1305,
            _ => return None,
        };
        Some(Self {
            suite,
            cipher,
            secret,
        })
    }

    /// Replaces the secret by the next one, for a key update.
    pub(super) fn update(&mut self) {
        let bytes = self.suite.common.hash_provider.output_len();
        self.secret = self.expand(b"traffic upd", bytes);
    }

    /// Derives the key and the IV.
    pub(super) fn keys(&self) -> (AeadKey, Iv) {
        let key_bytes = self.suite.aead_alg.key_len();
        let key = self.expand(b"key", key_bytes);
        let key = AeadKey::new(self.cipher, &key.as_ref()[..key_bytes]);
        let mut iv = [0; 12];
        iv.copy_from_slice(&self.expand(b"iv", 12).as_ref()[..12]);
        // The length is that of the suite's own cipher.
        (key.expect("a key of the cipher's length"), iv.into())
    }

    /// HKDF-Expand-Label without a context (RFC 8446 §7.1). The first `bytes` bytes of the block are the result: a key is no
    /// longer than the hash.
    fn expand(&self, label: &[u8], bytes: usize) -> OkmBlock {
        const PREFIX: &[u8] = b"tls13 ";
        let expander = self.suite.hkdf_provider.expander_for_okm(&self.secret);
        expander.expand_block(&[
            &(bytes as u16).to_be_bytes(),
            &[(PREFIX.len() + label.len()) as u8],
            PREFIX,
            label,
            &[0],
        ])
    }
}

impl std::fmt::Debug for TrafficSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TrafficSecret(..)")
    }
}

/// The first secrets of a connection.
#[derive(Default)]
pub(super) struct FirstSecrets {
    client: Option<OkmBlock>,
    server: Option<OkmBlock>,
}

thread_local! {
    /// What the step of a handshake that this thread runs has derived. `None` if it runs none whose secrets are taken.
    static DERIVED: RefCell<Option<FirstSecrets>> = const { RefCell::new(None) };
}

/// Hands the first traffic secrets to the handshake that derives them. Part of the configurations for tunnels.
#[derive(Debug)]
pub(crate) struct TakeSecrets;

impl FirstSecrets {
    /// Runs a step of a handshake, and takes the secrets that it derives.
    pub(super) fn take_from<T>(&mut self, step: impl FnOnce() -> T) -> T {
        DERIVED.set(Some(std::mem::take(self)));
        let result = step();
        *self = DERIVED.take().unwrap_or_default();
        result
    }

    /// The client's and the server's secret. `None` if the handshake has derived none, or if the cipher of `suite` is unknown.
    pub(super) fn of_suite(
        self,
        suite: &'static Tls13CipherSuite,
    ) -> Option<(TrafficSecret, TrafficSecret)> {
        let client = TrafficSecret::new(suite, self.client?)?;
        Some((client, TrafficSecret::new(suite, self.server?)?))
    }
}

impl KeyLog for TakeSecrets {
    fn will_log(&self, label: &str) -> bool {
        matches!(label, CLIENT | SERVER) && DERIVED.with_borrow(Option::is_some)
    }

    fn log(&self, label: &str, _client_random: &[u8], secret: &[u8]) {
        DERIVED.with_borrow_mut(|derived| match (label, derived) {
            (CLIENT, Some(derived)) => derived.client = Some(OkmBlock::new(secret)),
            (SERVER, Some(derived)) => derived.server = Some(OkmBlock::new(secret)),
            _ => {}
        });
    }
}

const CLIENT: &str = "CLIENT_TRAFFIC_SECRET_0";
const SERVER: &str = "SERVER_TRAFFIC_SECRET_0";

#[cfg(test)]
mod tests {
    use rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256;

    use super::*;

    fn bytes(text: &str) -> Vec<u8> {
        let digits = text.split_whitespace();
        digits
            .map(|byte| u8::from_str_radix(byte, 16).unwrap())
            .collect()
    }

    /// The server's first secret for application data in RFC 8448 §3, and its key and IV.
    #[test]
    fn derives_the_keys_of_the_rfcs_example() {
        let suite = TLS13_AES_128_GCM_SHA256.tls13().unwrap();
        let secret = OkmBlock::new(&bytes(
            "a1 1a f9 f0 55 31 f8 56 ad 47 11 6b 45 a9 50 32 82 04 b4 f4 4b fb 6b 3a 4b 4f 1f 3f cb 63 16 43",
        ));
        let secret = TrafficSecret::new(suite, secret).unwrap();
        assert_eq!(
            secret.expand(b"key", 16).as_ref()[..16],
            bytes("9f 02 28 3b 6c 9c 07 ef c2 6b b9 f2 ac 92 e3 56")
        );
        assert_eq!(
            secret.expand(b"iv", 12).as_ref()[..12],
            bytes("cf 78 2b 88 dd 83 54 9a ad f1 e9 84")
        );
    }

    #[test]
    fn secrets_are_taken_only_by_the_step_that_derives_them() {
        let derive = || {
            if TakeSecrets.will_log(CLIENT) {
                TakeSecrets.log(CLIENT, &[], &[1; 32]);
            }
        };
        derive();
        let mut first = FirstSecrets::default();
        first.take_from(|| ());
        assert!(first.client.is_none());
        first.take_from(derive);
        // Later steps derive nothing, and what was taken stays.
        first.take_from(|| ());
        assert_eq!(first.client.unwrap().as_ref(), [1; 32]);
        assert!(first.server.is_none() && !TakeSecrets.will_log(SERVER));
    }
}
