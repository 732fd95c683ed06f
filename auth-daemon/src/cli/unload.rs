//! `auth-daemon unload`: removes a stopped daemon's programs, maps, rules and routes from the kernel.

use std::path::PathBuf;

use crate::{config::Config, node};
use auth_datapath::{self, PinLock};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The configuration that the daemon ran with.
    #[arg(long)]
    config: PathBuf,
}

pub(super) fn unload(arguments: &Arguments) -> anyhow::Result<()> {
    let config = Config::load(&arguments.config)?;
    let socket = config.workload_api.socket.as_deref();
    if !config.pins.exists() {
        node::remove_socket(socket)?;
        println!(
            "nothing is loaded: {} does not exist",
            config.pins.display()
        );
        return Ok(());
    }
    let lock = PinLock::take(&config.pins)?;
    let socket_removed = node::remove_socket(socket);
    let pods = auth_datapath::unload::unload(lock)?;
    socket_removed?;
    println!(
        "unloaded: {pods} pods released, {} removed; pods now communicate in plaintext",
        config.pins.display()
    );
    Ok(())
}
