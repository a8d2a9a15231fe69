from agents import A, Loop, O, bits, model, offline, online, same

from clplat.strategies.rlpd import RLPD


def rlpd(**options):
    small = {"model": model(critics=3), "batch": 4, "memory": 50, "updates": 2, "random_steps": 5}
    return RLPD(**small | options)


def test_half_of_each_batch_is_offline_data():
    agent, experience = rlpd(), offline()
    agent.begin(experience)
    Loop(agent).act(4)
    of_data = {tuple(r) for r in experience.train.inputs[:, :O].tolist()}
    origin = [tuple(r) in of_data for r in agent._draw(2)[:, :O].tolist()]
    assert origin == [True, True, False, False] * 2


def test_nothing_is_learned_from_the_data_alone_and_the_first_steps_are_random():
    agent, experience = rlpd(), offline()
    agent.begin(experience)
    assert len(agent.training_data(experience)) == 0
    loop, before = Loop(agent), bits(agent)
    loop.act(5)
    assert same(before, bits(agent))
    loop.act(1)
    assert (loop.critic_steps, loop.actor_steps) == (2, 1)


def test_the_data_stay_with_the_learner_and_come_back_from_a_checkpoint():
    agent, other = rlpd(), rlpd()
    agent.begin(offline(30))
    other.load_state_dict(agent.state_dict())
    assert len(other.offline_data) == 30
    agent.begin(online())  # they serve in what follows
    assert len(agent.offline_data) == 30


def test_target_entropy_is_half_of_sacs():
    assert rlpd().target_entropy == -A / 2
    assert rlpd(target_entropy=-3.0).target_entropy == -3.0


def test_without_data_it_is_refused():
    for agent, sequence in ((rlpd(), [online()]), (rlpd(restart=True), [offline(), online()])):
        (line,) = agent.faults(sequence, True)  # a start run brings no data along
        assert "needs offline data, but online has none" in line
    assert rlpd().faults([offline(), online()], False) == []
    assert rlpd(retain=0.0).faults([online()], False) == []
