//! `raft-sqlite member ...`

use clap::{Args, Subcommand};
use kine_adapter::proto::etcdserverpb::cluster_client::ClusterClient;
use kine_adapter::proto::etcdserverpb::{MemberListRequest, MemberRemoveRequest};

use crate::Failure;
use crate::endpoint::{EndpointArguments, refused};
use crate::output::{self, Format};

#[derive(Subcommand)]
pub enum MemberCommand {
    /// Lists the members
    List(ListArguments),
    /// Removes a member for good: it counts for no majority any more, and its data directory is of no further use
    Remove(RemoveArguments),
}

#[derive(Args)]
pub struct ListArguments {
    #[command(flatten)]
    endpoints: EndpointArguments,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Args)]
pub struct RemoveArguments {
    /// The member's id, 16 hex digits as `member list` shows it
    id: String,
    #[command(flatten)]
    endpoints: EndpointArguments,
}

pub async fn run(command: MemberCommand) -> Result<(), Failure> {
    match command {
        MemberCommand::List(arguments) => list(arguments).await,
        MemberCommand::Remove(arguments) => remove(arguments).await,
    }
}

async fn list(arguments: ListArguments) -> Result<(), Failure> {
    let mut client = ClusterClient::new(arguments.endpoints.connect_any().await?);
    let request = MemberListRequest { linearizable: true };
    let answer = client.member_list(request).await.map_err(|status| refused(&status))?.into_inner();
    let rows = answer
        .members
        .into_iter()
        .map(|member| {
            vec![
                format!("{:016x}", member.id).into(),
                // Its client addresses are told by the member itself.
                if member.client_ur_ls.is_empty() { "unstarted" } else { "started" }.into(),
                member.name.into(),
                member.peer_ur_ls.into(),
                member.client_ur_ls.into(),
                member.is_learner.into(),
            ]
        })
        .collect();
    output::print(arguments.output, &["ID", "Status", "Name", "Peer addresses", "Client addresses", "Learner"], rows);
    Ok(())
}

async fn remove(arguments: RemoveArguments) -> Result<(), Failure> {
    let id = u64::from_str_radix(&arguments.id, 16)
        .map_err(|_| Failure::usage(format!("{:?} is no member id: see `raft-sqlite member list`", arguments.id)))?;
    let mut client = ClusterClient::new(arguments.endpoints.connect_any().await?);
    client.member_remove(MemberRemoveRequest { id }).await.map_err(|status| refused(&status))?;
    println!("Member {id:016x} is removed from the cluster");
    Ok(())
}
