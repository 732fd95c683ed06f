//! Which machines have joined the trust domain by a one-time token, and the tokens that are not used yet. Pure, and a part
//! of the CA's state, so that a token is used, and the join recorded, by one replacement of the state.

use std::{collections::BTreeMap, time::Duration};

use aws_lc_rs::digest;
use serde::{Deserialize, Serialize};

use crate::signer::hex;

/// The lifetime of a token unless another one is asked for.
pub const DEFAULT_LIFETIME: Duration = Duration::from_secs(10 * 60);
/// The shortest and the longest lifetime of a token.
pub const LIFETIMES: std::ops::RangeInclusive<Duration> =
    Duration::from_secs(60)..=Duration::from_secs(3600);
/// Why a token cannot be used. A caller that guesses tokens learns no more than that.
pub(crate) const GONE: &str = "the join token is unknown or expired: create another one";
/// Most tokens that are not used yet.
const MAX_TOKENS: usize = 100;
/// Most machines. All of them take some 300 KB of the state.
const MAX_NODES: usize = 1000;

/// Tokens and joined machines.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Joins {
    /// Tokens that are not used yet, by their hash.
    tokens: BTreeMap<String, JoinToken>,
    /// Machines, by their node's name.
    nodes: BTreeMap<String, JoinedNode>,
}

/// A token that is not used yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct JoinToken {
    /// The name of the node that joins with it.
    pub(crate) node: String,
    /// In seconds since the Unix epoch.
    pub(crate) expires: u64,
    /// User ID of the operator who created it.
    pub(crate) created_by: Option<u32>,
    /// Whether the machine replaces one of the same name.
    pub(crate) replace: bool,
}

/// A machine that has joined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct JoinedNode {
    /// Hash of its public key. Certificates of another key are refused.
    pub(crate) key: String,
    /// In seconds since the Unix epoch.
    pub(crate) at: u64,
    /// User ID of the operator who created its token.
    pub(crate) created_by: Option<u32>,
    /// Hash of its token, and when that expires: until then the same key may use it again, because the answer may have
    /// been lost.
    token: String,
    token_expires: u64,
}

/// SHA-256 in hexadecimal.
pub(crate) fn hash(bytes: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, bytes).as_ref())
}

impl Joins {
    pub(crate) fn is_empty(&self) -> bool {
        self.tokens.is_empty() && self.nodes.is_empty()
    }

    /// Adds a token with this hash.
    pub(crate) fn create(&mut self, hash: String, token: JoinToken) -> Result<(), String> {
        let node = &token.node;
        if self.nodes.contains_key(node) && !token.replace {
            return Err(format!(
                "node {node} has joined: with --replace, the machine that uses the token takes its place"
            ));
        }
        if self.tokens.values().any(|other| other.node == *node) {
            return Err(format!(
                "there is a token for node {node} already: delete it first, or use it"
            ));
        }
        if self.tokens.len() >= MAX_TOKENS {
            return Err(format!(
                "there are {MAX_TOKENS} unused tokens: delete some, or wait until they expire"
            ));
        }
        self.tokens.insert(hash, token);
        Ok(())
    }

    /// Removes the token for `node`. Returns whether there was one.
    pub(crate) fn delete(&mut self, node: &str) -> bool {
        let before = self.tokens.len();
        self.tokens.retain(|_, token| token.node != node);
        self.tokens.len() < before
    }

    /// The node of the token with this hash, if the token is unused or was used a moment ago.
    pub(crate) fn node_of(&self, hash: &str, now: u64) -> Option<&str> {
        let unused = self.tokens.get(hash).filter(|token| now < token.expires);
        unused.map(|token| token.node.as_str()).or_else(|| {
            let mut nodes = self.nodes.iter();
            let used = nodes.find(|(_, joined)| joined.token == hash && now < joined.token_expires);
            used.map(|(node, _)| node.as_str())
        })
    }

    /// Whether the machine with the key `key` has used the token with this hash a moment ago.
    pub(crate) fn is_used_by(&self, hash: &str, key: &str, now: u64) -> bool {
        self.nodes
            .values()
            .any(|joined| joined.token == hash && joined.key == key && now < joined.token_expires)
    }

    /// Uses the token with this hash for a machine with the key `key`.
    pub(crate) fn join(&mut self, hash: &str, key: String, now: u64) -> Result<(), String> {
        let node = self.node_of(hash, now).ok_or(GONE)?.to_owned();
        let Some(token) = self.tokens.remove(hash) else {
            return match self.is_used_by(hash, &key, now) {
                true => Ok(()),
                // The holder of the token may learn this: if the token was stolen, this is the first sign of it.
                false => Err(format!(
                    "the join token was used with another key: if this machine did not do that, revoke node {node}"
                )),
            };
        };
        let before = self.has_key(&node, &key);
        if before.is_some() && !token.replace {
            return Err(format!("node {node} has joined with another token"));
        }
        // A machine is replaced to get rid of its key.
        if before == Some(true) {
            return Err(format!(
                "the key is the one with which node {node} has joined: make a new one"
            ));
        }
        let known = before.is_some();
        if !known && self.nodes.len() >= MAX_NODES {
            return Err(format!(
                "{MAX_NODES} machines have joined: revoke nodes that are gone"
            ));
        }
        let joined = JoinedNode {
            key,
            at: now,
            created_by: token.created_by,
            token: hash.to_owned(),
            token_expires: token.expires,
        };
        self.nodes.insert(node, joined);
        Ok(())
    }

    /// Forgets `node` and a token for it.
    pub(crate) fn forget(&mut self, node: &str) {
        self.nodes.remove(node);
        self.delete(node);
    }

    /// Whether the machine with the key `key` has joined as `node`. `None` if none has.
    pub(crate) fn has_key(&self, node: &str, key: &str) -> Option<bool> {
        Some(self.nodes.get(node)?.key == key)
    }

    /// When the machine that is `node` now has joined. `None` if none has.
    pub(crate) fn joined_at(&self, node: &str) -> Option<u64> {
        Some(self.nodes.get(node)?.at)
    }

    /// Removes tokens that have expired, and returns them.
    pub(crate) fn expire(&mut self, now: u64) -> Vec<JoinToken> {
        let expired = self.tokens.values().filter(|token| token.expires <= now);
        let expired = expired.cloned().collect();
        self.tokens.retain(|_, token| now < token.expires);
        expired
    }

    /// When the next token expires.
    pub(crate) fn expiry(&self) -> Option<u64> {
        self.tokens.values().map(|token| token.expires).min()
    }

    pub(crate) fn tokens(&self) -> impl Iterator<Item = &JoinToken> {
        self.tokens.values()
    }

    pub(crate) fn nodes(&self) -> impl Iterator<Item = (&str, &JoinedNode)> {
        self.nodes.iter().map(|(name, node)| (name.as_str(), node))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(node: &str, replace: bool) -> JoinToken {
        JoinToken {
            node: node.into(),
            expires: 100,
            created_by: Some(0),
            replace,
        }
    }

    fn key(name: &str) -> String {
        name.to_owned()
    }

    #[test]
    fn a_token_is_used_once_but_its_answer_may_be_repeated() {
        let mut joins = Joins::default();
        joins.create("t".into(), token("vm", false)).unwrap();
        assert!(joins.clone().join("t", key("k"), 100).is_err(), "expired");
        joins.join("t", key("k"), 50).unwrap();
        assert_eq!(joins.has_key("vm", "k"), Some(true));
        joins.join("t", key("k"), 60).unwrap();
        for (hash, other, now, why) in [
            ("t", "stolen", 60, "with another key"),
            ("t", "k", 100, GONE),
            ("u", "k", 60, GONE),
        ] {
            let error = joins.join(hash, key(other), now).unwrap_err();
            assert!(error.contains(why), "{hash} {other}: {error}");
            assert!(!joins.is_used_by(hash, other, now), "{hash} {other}");
        }
        assert!(joins.is_used_by("t", "k", 60));
        assert_eq!(joins.has_key("vm", "stolen"), Some(false));
        joins.forget("vm");
        assert!(joins.join("t", key("k"), 60).is_err(), "revoked");
    }

    #[test]
    fn a_name_is_taken_again_only_on_purpose() {
        let mut joins = Joins::default();
        joins.create("t".into(), token("vm", false)).unwrap();
        let second = joins.create("u".into(), token("vm", true)).unwrap_err();
        assert!(second.contains("already"), "{second}");
        joins.join("t", key("k"), 1).unwrap();
        let again = joins.create("u".into(), token("vm", false)).unwrap_err();
        assert!(again.contains("--replace"), "{again}");
        joins.create("u".into(), token("vm", true)).unwrap();
        assert_eq!(joins.has_key("vm", "k"), Some(true), "until it is used");
        let same = joins.clone().join("u", key("k"), 2).unwrap_err();
        assert!(same.contains("make a new one"), "{same}");
        joins.join("u", key("l"), 2).unwrap();
        assert_eq!(joins.has_key("vm", "k"), Some(false));
        assert!(joins.join("t", key("k"), 3).is_err());
    }

    #[test]
    fn tokens_expire_and_are_bounded() {
        let mut joins = Joins::default();
        for number in 0..MAX_TOKENS {
            joins
                .create(number.to_string(), token(&format!("vm-{number}"), false))
                .unwrap();
        }
        assert!(joins.create("t".into(), token("vm", false)).is_err());
        assert!(joins.delete("vm-1") && !joins.delete("vm-1"));
        assert_eq!(joins.expiry(), Some(100));
        assert_eq!(joins.expire(99).len(), 0);
        assert_eq!(joins.expire(100).len(), MAX_TOKENS - 1);
        assert!(joins.is_empty());
    }
}
