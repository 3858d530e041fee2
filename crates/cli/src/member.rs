//! `raft-sqlite member ...`

use clap::{Args, Subcommand};
use kine_adapter::proto::etcdserverpb::MemberListRequest;
use kine_adapter::proto::etcdserverpb::cluster_client::ClusterClient;

use crate::Failure;
use crate::endpoint::{EndpointArguments, refused};
use crate::output::{self, Format};

#[derive(Subcommand)]
pub enum MemberCommand {
    /// Lists the members
    List(ListArguments),
}

#[derive(Args)]
pub struct ListArguments {
    #[command(flatten)]
    endpoints: EndpointArguments,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

pub async fn run(command: MemberCommand) -> Result<(), Failure> {
    match command {
        MemberCommand::List(arguments) => list(arguments).await,
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
                format!("{:016x}", member.id),
                if member.name.is_empty() { "unstarted" } else { "started" }.to_owned(),
                member.name,
                member.peer_ur_ls.join(","),
                member.client_ur_ls.join(","),
                member.is_learner.to_string(),
            ]
        })
        .collect();
    output::print(arguments.output, &["ID", "Status", "Name", "Peer addresses", "Client addresses", "Learner"], rows);
    Ok(())
}
